"""The keywords of a run, checked and completed: names, dtypes, shapes that agree on batch and sequence, values that
exist in the tables they are looked up in, defaults.

arange   0 .. size-1 along the last dim, the same in every row: one row given stands for all
ones, zeros

Values are checked where they lie on the CPU, as a tokenizer leaves them. On an accelerator the check would make the
host wait for the device on every run, so it is left out there; what a sampler yields is in the vocabulary anyway. A
prompt moved by hand loses the check: give it on the CPU, the engine moves it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.program.rank_program import Bound, RunInput

__all__ = ["complete_inputs"]

_MASK, _TOKENS = "attention_mask", "input_ids"
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, True, False),
    "return_dict": (None, True),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_router_logits": (None, False),
    "logits_to_keep": (None, 0),
    **dict.fromkeys(("past_key_values", "inputs_embeds", "labels", "head_mask", "cache_position"), (None,)),
    **dict.fromkeys((_MASK, "position_ids", "token_type_ids"), (None,)),
}
"""Keywords of transformers' forward, and the values at which they change nothing of the result."""
_NARROWER = {torch.uint8, torch.int8, torch.int16, torch.int32}


def complete_inputs(
    inputs: tuple[RunInput, ...],
    given: Mapping[str, Any],
    device: torch.device,
    limits: Mapping[str, tuple[int, int | None]] | None = None,
) -> list[Tensor]:
    """One tensor per input, in order, on `device`. `limits`: by dim, the smallest and largest size."""
    names = [wanted.name for wanted in inputs]
    for name, value in given.items():
        if name not in names and not _is_neutral(name, value, given):
            raise InputError(_unknown(name, names))
    given = {wanted.name: _widened(wanted, given.get(wanted.name)) for wanted in inputs}
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
        if value is None:
            if wanted.without is not None:
                _check_unpadded(given.get(_TOKENS), wanted.without, mask=wanted.name)
            completed.append(_default(wanted, sizes, device))
        else:
            if wanted.bound is not None and value.device.type == "cpu":
                _check_values(wanted.name, value, wanted.bound)
            completed.append(_all_rows(wanted, value, sizes).to(device))
    return completed


def _is_neutral(name: str, value: Any, given: Mapping[str, Any]) -> bool:
    if name == _MASK and isinstance(value, Tensor) and not value.is_meta:
        ids = given.get("input_ids")
        return isinstance(ids, Tensor) and value.shape == ids.shape and bool((value == 1).all())
    return any(value is same or (type(value) is int and value == same) for same in _NEUTRAL.get(name, ()))


def _widened(wanted: RunInput, value: Any) -> Any:
    if isinstance(value, Tensor) and wanted.dtype is torch.int64:
        is_mask = wanted.default == "ones" and value.dtype is torch.bool
        return value.long() if is_mask or value.dtype in _NARROWER else value
    return value


def _unknown(name: str, names: list[str]) -> str:
    known = f"he inputs are {', '.join(names)}"
    if name == _MASK:
        return (
            f"unknown input {name!r}; this model takes no mask but one of ones: in a decoder, pad on the right, where "
            "no token of the prompt sees it, and ignore what comes out at the padding; else give prompts of one "
            f"length. T{known}"
        )
    near = difflib.get_close_matches(name, names, n=1)
    return f"unknown input {name!r}; " + (f"did you mean {near[0]!r}? T{known}" if near else f"t{known}")


def _check(wanted: RunInput, value: Tensor, sizes: dict[str, tuple[int, str]]) -> None:
    name = wanted.name
    if not isinstance(value, Tensor):
        raise InputError(f"input {name!r} must be a tensor, got {type(value).__name__}")
    if value.is_meta:
        raise InputError(f"input {name!r} must hold data, got a tensor on the meta device")
    if value.dtype != wanted.dtype:
        raise InputError(f"input {name!r} must have the dtype {wanted.dtype}, got {value.dtype}")
    if value.dim() != len(wanted.shape):
        raise InputError(f"input {name!r} must have the shape {_shape(wanted)}, got {list(value.shape)}")
    for dim, (named, size) in enumerate(zip(wanted.shape, value.shape, strict=True)):
        if isinstance(named, int):
            if size != named:
                raise InputError(f"input {name!r} must have the shape {_shape(wanted)}, got {list(value.shape)}")
        elif size == 0:
            raise InputError(f"input {name!r} is empty: its {named} is 0")
        elif dim == 0 and size == 1 and _same_in_every_row(wanted) and named in sizes:
            continue
        elif sizes.setdefault(named, (size, name))[0] != size:
            known, whose = sizes[named]
            raise InputError(f"input {name!r} has {named} {size}, but {whose!r} has {named} {known}")


def _check_values(name: str, value: Tensor, bound: Bound) -> None:
    smallest, largest = torch.aminmax(value)
    if smallest < bound.low or largest > bound.high:
        at = ((value < bound.low) | (value > bound.high)).nonzero()[0].tolist()
        raise InputError(f"input {name!r} holds {int(value[tuple(at)])} at {at}, but its values must be {bound}")


def _check_unpadded(ids: Tensor | None, token: int, *, mask: str) -> None:
    """On any device: few models ask for it, and what they say otherwise is wrong."""
    if ids is not None and bool(ids.eq(token).any()):
        raise InputError(
            f"input {_TOKENS!r} holds the padding token {token}, which this model masks by itself where it is given no "
            f"{mask!r}: give {mask}=(input_ids != {token}).long(), or ones to mask nothing"
        )


def _same_in_every_row(wanted: RunInput) -> bool:
    """Positions are; a mask or a type of token belongs to its prompt, and one row for several is a mistake."""
    return wanted.default == "arange" and len(wanted.shape) > 1


def _all_rows(wanted: RunInput, value: Tensor, sizes: Mapping[str, tuple[int, str]]) -> Tensor:
    rows = wanted.shape[0] if wanted.shape else 1
    if not _same_in_every_row(wanted) or isinstance(rows, int):
        return value
    return value.expand(sizes[rows][0], *value.shape[1:])


def _default(wanted: RunInput, sizes: Mapping[str, tuple[int, str]], device: torch.device) -> Tensor:
    if wanted.default == "required":
        raise InputError(f"input {wanted.name!r} is required: {_shape(wanted)}, {wanted.dtype}")
    shape = []
    for dim in wanted.shape:
        if isinstance(dim, str) and dim not in sizes:
            raise InputError(f"input {wanted.name!r} has no default without an input that tells the {dim}: give one")
        shape.append(dim if isinstance(dim, int) else sizes[dim][0])
    if wanted.default == "arange":
        if wanted.bound is not None and shape[-1] - 1 > wanted.bound.high:
            last = wanted.shape[-1]
            whose = f"input {sizes[last][1]!r} has {last} {shape[-1]}" if isinstance(last, str) else "too long"
            raise InputError(
                f"{whose}, and this model takes at most {wanted.bound.high + 1}: the values of {wanted.name!r}, "
                f"0, 1, 2 and so on, must be {wanted.bound}"
            )
        return torch.arange(shape[-1], dtype=wanted.dtype, device=device).expand(shape)
    if wanted.default == "ones":
        return torch.ones(shape, dtype=wanted.dtype, device=device)
    if wanted.default == "zeros":
        return torch.zeros(shape, dtype=wanted.dtype, device=device)
    raise InputError(f"input {wanted.name!r} has the unknown default {wanted.default!r}")


def _shape(wanted: RunInput) -> str:
    return f"[{', '.join(map(str, wanted.shape))}]"
