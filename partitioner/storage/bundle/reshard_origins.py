"""Splitting a bundle anew: where the ranks of another plan find their parts among the slices that are stored.

A part is what its rank holds of each dim; so is a slice. What they have in common is the same, dim by dim, and what is
then still missing is cut into parts, which are looked for in the slices of the other ranks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from partitioner.errors import WeightError
from partitioner.sharding.index_set import IndexSet
from partitioner.storage.bundle.format.rank_format import Stored
from runtime.program.shards import Piece, WeightShard
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import TensorFiles

__all__ = ["SliceOrigins"]

Part = tuple[IndexSet, ...]
"""Indices of each dim; the elements are all combinations of them."""


class SliceOrigins:
    """`stored`: the weights of all ranks; `files`: that hold them; `mapped`: as in `runtime.weights.read_shards`."""

    def __init__(self, stored: Iterable[Stored], files: TensorFiles, *, mapped: bool = False) -> None:
        self.files = files
        self._mapped = mapped
        self._slices: dict[str, dict[tuple[str | None, str], Stored]] = {}
        for each in stored:
            self._slices.setdefault(each.shard.name, {})[each.file, each.key] = each

    @functools.cached_property
    def source(self) -> Reader:
        return Reader(self.files, mapped=self._mapped)

    def find(self, name: str, aliases: Sequence[str]) -> Mapping[tuple[str | None, str], Stored]:
        """The slices of a weight. Raises `WeightError` where there are none."""
        for known in (name, *aliases):
            if known in self._slices:
                return self._slices[known]
        raise WeightError(f"{self.files.folder} holds nothing of the weight {name!r}, which this model has")

    def of(self, shard: WeightShard) -> tuple[Piece, ...]:
        """The pieces of a rank's part of a weight."""
        wanted = _held(shard)
        missing = [wanted]
        found: list[Piece] = []
        for each in self.find(shard.name, shard.aliases).values():
            if each.shard.global_shape != shard.global_shape or each.shard.dtype != shard.dtype:
                raise WeightError(
                    f"{shard.name!r} is stored as {each.shard.dtype} {list(each.shard.global_shape)}; this model needs "
                    f"{shard.dtype} {list(shard.global_shape)}"
                )
            held = _held(each.shard)
            still: list[Part] = []
            for part in missing:
                common = tuple(a & b for a, b in zip(part, held, strict=True))
                if all(indices.size for indices in common):
                    found += _pieces(each.key, common, held, wanted)
                    still += _without(part, common)
                else:
                    still.append(part)
            missing = still
        if any(all(indices.size for indices in part) for part in missing):
            raise WeightError(f"{self.files.folder} does not hold all of the weight {shard.name!r}")
        return tuple(found)


def _held(shard: WeightShard) -> Part:
    return tuple(
        IndexSet.range(0, size) if own is None else own
        for size, own in zip(shard.global_shape, shard.indices, strict=True)
    )


def _without(part: Part, common: Part) -> Iterator[Part]:
    """What of `part` is not in `common`, which lies within it."""
    for dim, (indices, taken) in enumerate(zip(part, common, strict=True)):
        rest = indices - taken
        if rest.size:
            yield (*common[:dim], rest, *part[dim + 1 :])


def _pieces(key: str, common: Part, held: Part, wanted: Part) -> Iterator[Piece]:
    runs = [
        [((own.index(a), own.index(a) + b - a), (new.index(a), new.index(a) + b - a)) for a, b in indices.intervals]
        for indices, own, new in zip(common, held, wanted, strict=True)
    ]
    for block in itertools.product(*runs):
        yield Piece(key, tuple(source for source, _ in block), tuple(destination for _, destination in block))
