"""Loading: the slices of the weights that one rank holds, as tensors of their own.

    source   a mapping of whole tensors by name (a state_dict), or a callable (name, block) -> that block of the tensor

A slice of a tensor keeps the whole of it in memory, so slices are copied; a weight that the rank needs whole is shared.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from partitioner.errors import WeightError
from runtime.rank_program import Block, WeightShard

__all__ = ["WeightSource", "load_weights"]

WeightSource = Mapping[str, Tensor] | Callable[[str, Block], Tensor]


def load_weights(
    weights: Sequence[WeightShard], values: Mapping[str, Tensor], source: WeightSource | None, device: torch.device
) -> list[Tensor]:
    """One tensor per weight, from `source`; None: from `values`, the data that the program came with."""
    return [_load(weight, values, source, device) for weight in weights]


def _load(
    weight: WeightShard, values: Mapping[str, Tensor], source: WeightSource | None, device: torch.device
) -> Tensor:
    if weight.made is not None:
        return _make(weight, values, source, device)
    known = _find(values, weight)
    has_data = known is not None and not known.is_meta
    if callable(source) and (weight.source == "checkpoint" or not has_data):
        return _assemble(weight, source, device)
    found = None if source is None or callable(source) else _find(source, weight)
    whole = found if found is not None else known if has_data or source is None else None
    if whole is None:
        raise WeightError(_missing(weight, () if source is None or callable(source) else source))
    if tuple(whole.shape) != weight.global_shape:
        raise WeightError(
            f"weight {weight.name!r} must have the shape {list(weight.global_shape)}, got {list(whole.shape)}"
        )
    _require_data(weight, whole)
    if weight.is_whole:
        return whole.detach().to(device)
    return _assemble(weight, lambda _, block: whole[tuple(slice(*ends) for ends in block)], device)


def _make(
    weight: WeightShard, values: Mapping[str, Tensor], source: WeightSource | None, device: torch.device
) -> Tensor:
    """From the whole tensor that it is made of, one weight at a time; then the rank's part of it."""
    assert weight.made is not None
    of = weight.made.of
    with torch.no_grad():
        whole = weight.made.make(_load(of, values, source, device))
    if tuple(whole.shape) != weight.global_shape or whole.dtype != weight.dtype:
        raise WeightError(
            f"weight {weight.name!r} must be {weight.dtype} {list(weight.global_shape)}; what "
            f"{weight.made.make.__qualname__} makes of {of.name!r} is {whole.dtype} {list(whole.shape)}"
        )
    if weight.is_whole:
        return whole
    return _assemble(weight, lambda _, block: whole[tuple(slice(*ends) for ends in block)], device)


def _assemble(weight: WeightShard, read: Callable[[str, Block], Tensor], device: torch.device) -> Tensor:
    local = torch.empty(weight.local_shape, dtype=weight.dtype, device=device)
    for piece in weight.pieces:
        block = read(piece.tensor, piece.source).detach()
        required = [stop - start for start, stop in piece.source]
        if list(block.shape) != required:
            raise WeightError(f"block {piece.source} of {piece.tensor!r} must be {required}, got {list(block.shape)}")
        _require_data(weight, block)
        # () is the whole of a scalar
        local[tuple(slice(*ends) for ends in piece.destination)] = block
    return local


def _find(values: Mapping[str, Tensor], weight: WeightShard) -> Tensor | None:
    for name in (weight.name, *weight.aliases):
        if name in values:
            return values[name]
    return None


def _require_data(weight: WeightShard, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise WeightError(
            f"weight {weight.name!r} has no data (it is on the meta device): give weights=, for example the "
            "state_dict of the loaded model with its buffers"
        )
    if tensor.dtype != weight.dtype:
        raise WeightError(
            f"weight {weight.name!r} must have the dtype {weight.dtype} that the model was captured in, "
            f"got {tensor.dtype}: convert the model before partitioning it"
        )


def _missing(weight: WeightShard, names: Mapping[str, Tensor] | tuple[()]) -> str:
    near = difflib.get_close_matches(weight.name, list(names), n=3)
    hint = f"; near: {', '.join(near)}" if near else ""
    aliases = f" (or {', '.join(weight.aliases)})" if weight.aliases else ""
    if weight.source != "checkpoint":
        hint += "; no checkpoint holds it (it is computed when the model is built): add the model's named_buffers()"
    return f"no data for weight {weight.name!r}{aliases} among the weights given{hint}"
