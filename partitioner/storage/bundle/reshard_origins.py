"""Splitting a bundle anew: where the ranks of another plan find their parts among the slices that are stored.

A part is what its rank holds of each dim; so is a slice. What they have in common is the same, dim by dim, and what is
then still missing is cut into parts, which are looked for in the slices of the other ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

from partitioner.errors import WeightError
from partitioner.storage.bundle.format.weight_format import Stored
from partitioner.storage.bundle.held_slices import HeldSlice
from partitioner.storage.bundle.held_weight import HeldWeight
from partitioner.storage.bundle.slice_pieces import cover, part_of, pieces
from runtime.program.shards import Piece, WeightShard
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import TensorFiles

__all__ = ["SliceOrigins"]


class SliceOrigins:
    """`stored`: the weights of all ranks; `files`: that hold them; `mapped`: as in `runtime.weights.read_shards`; held:
    what of the weights is quantised.
    """

    def __init__(
        self, stored: Iterable[Stored], files: TensorFiles, held: Iterable[HeldSlice], *, mapped: bool
    ) -> None:
        self.files = files
        self._mapped = mapped
        self._slices: dict[str, dict[tuple[str | None, str], Stored]] = {}
        for each in stored:
            self._slices.setdefault(each.shard.name, {})[each.file, each.key] = each
        quantized: dict[str, list[HeldSlice]] = {}
        for part in held:
            quantized.setdefault(part.of.weight.name, []).append(part)
        files.packed = {part.key: part.packed for parts in quantized.values() for part in parts}
        self._held = {name: self._held_weight(name, parts) for name, parts in quantized.items()}

    def _held_weight(self, name: str, parts: list[HeldSlice]) -> HeldWeight:
        if len({part.kind for part in parts}) > 1:
            raise WeightError(
                f"{self.files.folder}: its ranks hold {name!r} in different forms or shapes: the bundle was altered; "
                "write it anew"
            )
        return HeldWeight(name, parts, self.of, str(self.files.folder))

    @functools.cached_property
    def source(self) -> Reader:
        return Reader(self.files, mapped=self._mapped)

    def find(self, name: str, aliases: Sequence[str]) -> HeldWeight | Mapping[tuple[str | None, str], Stored]:
        """The slices of a weight. Raises `WeightError` where there are none."""
        for known in (name, *aliases):
            if known in self._slices:
                return self._slices[known]
            if known in self._held:
                return self._held[known]
        raise WeightError(f"{self.files.folder} holds nothing of the weight {name!r}, which this model has")

    @property
    def has_quantized(self) -> bool:
        return bool(self._held)

    def held_form(self, name: str, aliases: Sequence[str]) -> HeldWeight | None:
        """How a weight is held as it is stored; None where it is held as numbers."""
        found = self.find(name, aliases)
        return found if isinstance(found, HeldWeight) else None

    def of(self, shard: WeightShard) -> tuple[Piece, ...]:
        """The pieces of a rank's part of a weight."""
        slices = self.find(shard.name, shard.aliases)
        if isinstance(slices, HeldWeight):
            return slices.numbers(shard)
        for each in slices.values():
            if each.shard.global_shape != shard.global_shape or each.shard.dtype != shard.dtype:
                raise WeightError(
                    f"{shard.name!r} is stored as {each.shard.dtype} {list(each.shard.global_shape)}; this model needs "
                    f"{shard.dtype} {list(shard.global_shape)}"
                )
        wanted = part_of(shard)
        parts = [((each.key, held), held) for each in slices.values() for held in [part_of(each.shard)]]
        found = cover(wanted, parts, shard.name, str(self.files.folder))
        return tuple(piece for (key, held), common in found for piece in pieces(key, common, held, wanted))
