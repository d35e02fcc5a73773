"""Loading: the slices of the weights that one rank holds, as tensors of their own.

    source   a mapping of whole tensors by name (a state_dict), a callable (name, block) -> that block of the tensor,
             or a Reader of a checkpoint's files

A slice of a tensor keeps the whole of it in memory, so slices are copied; a weight that the rank needs whole is shared.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from partitioner.errors import WeightError
from runtime.program.shards import Block, WeightShard, WeightSource, at, extents
from runtime.weights.read_shards import Reader

__all__ = ["load_weights"]


def load_weights(
    weights: Sequence[WeightShard],
    values: Mapping[str, Tensor],
    source: WeightSource | None,
    device: torch.device,
    *,
    progress: bool = False,
) -> list[Tensor]:
    """One tensor per weight, from `source`; None: from `values`, the data that the program came with.

    `progress`: a Reader says on a terminal how far it is.
    """
    found: dict[WeightShard, Tensor] = {}
    if isinstance(source, Reader):
        stored = [weight for weight in weights if weight.made is None and not _is_known(weight, values)]
        found = dict(zip(stored, source.load(stored, device, progress=progress), strict=True))
    return [found[weight] if weight in found else _load(weight, values, source, device) for weight in weights]


def _is_known(weight: WeightShard, values: Mapping[str, Tensor]) -> bool:
    """Whether no source is asked: no checkpoint holds it, and its data came with the program."""
    known = _find(values, weight)
    return weight.source != "checkpoint" and known is not None and not known.is_meta


def _load(
    weight: WeightShard, values: Mapping[str, Tensor], source: WeightSource | None, device: torch.device
) -> Tensor:
    if weight.made is not None:
        return _make(weight, values, source, device)
    if callable(source) and not _is_known(weight, values):
        return _assemble(weight, source, device)
    known = _find(values, weight)
    found = _find(source, weight) if isinstance(source, Mapping) else None
    has_data = known is not None and not known.is_meta
    whole = found if found is not None else known if has_data or source is None else None
    if whole is None:
        raise WeightError(_missing(weight, source if isinstance(source, Mapping) else ()))
    if tuple(whole.shape) != weight.global_shape:
        raise WeightError(
            f"weight {weight.name!r} must have the shape {list(weight.global_shape)}, got {list(whole.shape)}"
        )
    _require_data(weight, whole)
    if weight.is_whole:
        return whole.detach().to(device)
    return _assemble(weight, lambda _, block: whole[at(block)], device)


def _make(
    weight: WeightShard, values: Mapping[str, Tensor], source: WeightSource | None, device: torch.device
) -> Tensor:
    """From the whole tensor that it is made of, one weight at a time; then the rank's part of it."""
    assert weight.made is not None
    of = weight.made.of
    with torch.no_grad():
        whole = weight.made.make(load_weights([of], values, source, device)[0])
    if tuple(whole.shape) != weight.global_shape or whole.dtype != weight.dtype:
        raise WeightError(
            f"weight {weight.name!r} must be {weight.dtype} {list(weight.global_shape)}; what "
            f"{weight.made.make.__qualname__} makes of {of.name!r} is {whole.dtype} {list(whole.shape)}"
        )
    if weight.is_whole:
        return whole
    return _assemble(weight, lambda _, block: whole[at(block)], device)


def _assemble(weight: WeightShard, read: Callable[[str, Block], Tensor], device: torch.device) -> Tensor:
    local = torch.empty(weight.local_shape, dtype=weight.dtype, device=device)
    # by the model's own names: those of a checkpoint may differ
    for piece in weight.own_pieces:
        block = read(piece.tensor, piece.source).detach()
        required = list(extents(piece.source))
        if list(block.shape) != required:
            raise WeightError(f"block {piece.source} of {piece.tensor!r} must be {required}, got {list(block.shape)}")
        _require_data(weight, block)
        local[at(piece.destination)] = block
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
