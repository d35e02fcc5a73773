"""Whether kernels in Triton can run here, which builds what launches them with the machine's C compiler; and launching.

To find what it has compiled for the arguments at hand takes Triton longer than all else of a launch, several times as
long as a kernel for a few tokens runs: `launch` remembers it by what Triton makes it depend on.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_run", "launch", "missing_for_triton"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Tensor | int, ...],
    *,
    num_warps: int = 4,
    num_stages: int | None = None,
    **constants: Any,
) -> None:
    """kernel[grid](*arguments, **constants), whose parameters stand in that order and have no defaults."""
    traits = [
        (each.dtype, each.data_ptr() % 16, each.device) if isinstance(each, Tensor) else _of_number(each)
        for each in arguments
    ]
    key = (id(kernel), num_warps, num_stages, *constants.items(), *traits)
    if (found := _ready.get(key)) is not None:
        compiled, rest = found
        try:
            compiled[grid](*arguments, *rest)
            return
        except (AttributeError, TypeError):  # it is not Triton's stable interface
            _ready.clear()
    options = {"num_warps": num_warps} if num_stages is None else {"num_warps": num_warps, "num_stages": num_stages}
    compiled = kernel[grid](*arguments, **constants, **options)
    names = None if compiled is None else getattr(kernel, "arg_names", None)  # the interpreter compiles nothing
    if names is not None:
        _ready[key] = compiled, tuple(constants[name] for name in names[len(arguments) :])


def _of_number(number: int) -> tuple[bool, bool, bool, bool]:
    """What a compiled kernel takes for granted of a number that it is given."""
    return isinstance(number, bool), number == 1, number % 16 == 0, -(1 << 31) <= number < 1 << 31


def can_run(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels for one token can read such rows here: numbers of `dtype`, or codes that stand for them."""
    if rows.device.type != "cuda" or dtype not in _DTYPES or missing_for_triton():
        return False
    return rows.dtype in (dtype, torch.uint8)
