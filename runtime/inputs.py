"""The keywords of a run, checked and completed: names, dtypes, shapes that agree on batch and sequence, defaults.

arange   0 .. size-1 along the last dim, the same in every row
ones, zeros
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.rank_program import RunInput

__all__ = ["complete_inputs"]


def complete_inputs(
    inputs: tuple[RunInput, ...],
    given: Mapping[str, Tensor | None],
    device: torch.device,
    limits: Mapping[str, tuple[int, int | None]] | None = None,
) -> list[Tensor]:
    """One tensor per input, in order, on `device`. `limits`: by dim, the smallest and largest size."""
    names = [wanted.name for wanted in inputs]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"unknown input {name!r}{hint} The inputs are {', '.join(names)}")
    sizes: dict[str, tuple[int, str]] = {}
    for wanted in inputs:
        value = given.get(wanted.name)
        if value is not None:
            _check(wanted, value, sizes)
    for dim, (low, high) in (limits or {}).items():
        size, name = sizes.get(dim, (low, ""))
        if size < low or (high is not None and size > high):
            most = "" if high is None else f" to {high}"
            raise InputError(f"input {name!r} has {dim} {size}, but this model was compiled for {dim} {low}{most}")
    completed = []
    for wanted in inputs:
        value = given.get(wanted.name)
        completed.append(_default(wanted, sizes, device) if value is None else value.to(device))
    return completed


def _check(wanted: RunInput, value: Tensor, sizes: dict[str, tuple[int, str]]) -> None:
    name = wanted.name
    if not isinstance(value, Tensor):
        raise InputError(f"input {name!r} must be a tensor, got {type(value).__name__}")
    if value.dtype != wanted.dtype:
        raise InputError(f"input {name!r} must have the dtype {wanted.dtype}, got {value.dtype}")
    if value.dim() != len(wanted.shape):
        raise InputError(f"input {name!r} must have the shape {_shape(wanted)}, got {list(value.shape)}")
    for dim, size in zip(wanted.shape, value.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                raise InputError(f"input {name!r} must have the shape {_shape(wanted)}, got {list(value.shape)}")
        elif size == 0:
            raise InputError(f"input {name!r} is empty: its {dim} is 0")
        elif sizes.setdefault(dim, (size, name))[0] != size:
            known, whose = sizes[dim]
            raise InputError(f"input {name!r} has {dim} {size}, but {whose!r} has {dim} {known}")


def _default(wanted: RunInput, sizes: Mapping[str, tuple[int, str]], device: torch.device) -> Tensor:
    if wanted.default == "required":
        raise InputError(f"input {wanted.name!r} is required: {_shape(wanted)}, {wanted.dtype}")
    shape = []
    for dim in wanted.shape:
        if isinstance(dim, str) and dim not in sizes:
            raise InputError(f"input {wanted.name!r} has no default without an input that tells the {dim}: give one")
        shape.append(dim if isinstance(dim, int) else sizes[dim][0])
    if wanted.default == "arange":
        return torch.arange(shape[-1], dtype=wanted.dtype, device=device).expand(shape)
    if wanted.default == "ones":
        return torch.ones(shape, dtype=wanted.dtype, device=device)
    if wanted.default == "zeros":
        return torch.zeros(shape, dtype=wanted.dtype, device=device)
    raise InputError(f"input {wanted.name!r} has the unknown default {wanted.default!r}")


def _shape(wanted: RunInput) -> str:
    return f"[{', '.join(map(str, wanted.shape))}]"
