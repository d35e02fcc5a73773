"""A part put together from slices: what they have in common, dim by dim, until nothing is missing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

from partitioner.errors import WeightError
from partitioner.sharding.index_set import IndexSet
from runtime.program.shards import Piece, WeightShard

__all__ = ["Part", "cover", "part_of", "pieces"]

Part = tuple[IndexSet, ...]
"""Indices of each dim; the elements are all combinations of them."""

T = TypeVar("T")


def part_of(shard: WeightShard) -> Part:
    return tuple(
        IndexSet.range(0, size) if own is None else own
        for size, own in zip(shard.global_shape, shard.indices, strict=True)
    )


def cover(wanted: Part, slices: Iterable[tuple[T, Part]], name: str, where: str) -> Iterator[tuple[T, Part]]:
    """What is taken of which slice, each element once. Raises `WeightError` where they do not hold all of it."""
    missing = [wanted]
    for each, held in slices:
        still: list[Part] = []
        for part in missing:
            common = tuple(a & b for a, b in zip(part, held, strict=True))
            if all(indices.size for indices in common):
                yield each, common
                still += _without(part, common)
            else:
                still.append(part)
        missing = still
    if any(all(indices.size for indices in part) for part in missing):
        raise WeightError(f"{where} does not hold all of the weight {name!r}")


def _without(part: Part, common: Part) -> Iterator[Part]:
    """What of `part` is not in `common`, which lies within it."""
    for dim, (indices, taken) in enumerate(zip(part, common, strict=True)):
        rest = indices - taken
        if rest.size:
            yield (*common[:dim], rest, *part[dim + 1 :])


def pieces(key: str, common: Part, held: Part, wanted: Part) -> Iterator[Piece]:
    """What is taken of a slice, block by block: its place there, and in the part that is wanted."""
    runs = [
        [((own.index(a), own.index(a) + b - a), (new.index(a), new.index(a) + b - a)) for a, b in indices.intervals]
        for indices, own, new in zip(common, held, wanted, strict=True)
    ]
    for block in itertools.product(*runs):
        yield Piece(key, tuple(source for source, _ in block), tuple(destination for _, destination in block))
