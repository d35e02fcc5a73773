"""Whether kernels in Triton can run here, which builds what launches them with the machine's C compiler; and launching.

launch(kernel, grid, arguments, ..)   kernel[grid](*arguments, ..)
replayed()                            what runs in the block is about to be captured, and comes again

To find what it has compiled for the arguments at hand takes Triton longer than all else of a launch, several times as
long as a kernel for a few tokens runs: `launch` remembers it by what Triton makes it depend on.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_run", "is_replayed", "launch", "missing_for_triton", "next_power_of_2", "replayed"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_is_replayed = ContextVar("is_replayed", default=False)
_ready: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
"""Compiled kernels, and the constants that they are given behind their arguments."""


@functools.cache
def missing_for_triton() -> str:
    """What is missing; "": nothing."""
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang") if name):
        return "no C compiler, which triton needs"
    scheme = sysconfig.get_default_scheme()
    # as triton has it: Debian's own scheme names a folder that holds no headers
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    if not Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h").is_file():
        return "no headers of Python, which triton needs"
    return ""


@contextmanager
def replayed() -> Iterator[None]:
    """In the block launches cost the host nothing when it counts, and what is prepared for sizes serves them again."""
    before = _is_replayed.set(True)
    try:
        yield
    finally:
        _is_replayed.reset(before)


def is_replayed() -> bool:
    return _is_replayed.get()


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Tensor | int | float, ...],
    *,
    num_warps: int = 4,
    num_stages: int | None = None,
    **constants: Any,
) -> None:
    """kernel[grid](*arguments, **constants), whose parameters stand in that order and have no defaults. The first
    argument is a tensor.
    """
    options = {"num_warps": num_warps} if num_stages is None else {"num_warps": num_warps, "num_stages": num_stages}
    given: list[int | float] = []
    traits: list[Any] = []
    for each in arguments:
        if isinstance(each, Tensor):
            address = each.data_ptr()
            given.append(address)
            traits += each.dtype, address & 15 == 0
        elif isinstance(each, float):
            given.append(each)  # nothing is taken for granted of it
        else:
            given.append(each)
            # what a compiled kernel takes for granted of a number
            traits.append((each == 1, each & 15 == 0, -(1 << 31) <= each < 1 << 31))
    assert isinstance(arguments[0], Tensor)
    device = arguments[0].get_device()
    key = (id(kernel), num_warps, num_stages, device, *constants.items(), *traits)
    if (found := _ready.get(key)) is not None:
        made, rest = found
        try:
            stream = torch._C._cuda_getCurrentRawStream(device)
            # neither metadata nor hooks, which are for Triton's profiler; addresses need not be looked at again
            made.run(*grid, stream, made.function, made.packed_metadata, None, None, None, *given, *rest)
            return
        except (AttributeError, TypeError):  # it is not Triton's stable interface
            _ready.clear()
    made = kernel[grid](*arguments, **constants, **options)
    names = None if made is None else getattr(kernel, "arg_names", None)  # the interpreter compiles nothing
    if names is not None:
        _ready[key] = made, tuple(constants[name] for name in names[len(arguments) :])


def next_power_of_2(count: int) -> int:
    """As `triton.next_power_of_2`, also where there is no triton; 1 of none."""
    return 1 << max(0, count - 1).bit_length()


def can_run(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels for one token can read such rows here: numbers of `dtype`, or codes that stand for them."""
    if rows.device.type != "cuda" or dtype not in _DTYPES or missing_for_triton():
        return False
    return rows.dtype in (dtype, torch.uint8)
