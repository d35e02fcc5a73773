"""The tokens of one run, as the host knows them before it starts; and which of its rows attention takes together.

a row each    positions [B, S]     shorter rows repeat their last token
packed        positions [1, N]     those of all sequences behind each other, none filled up
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batch", "PagedRows", "Part", "together"]


@dataclass(frozen=True)
class PagedRows:
    """Which rows of a cache in blocks a run is about: their numbers, and the blocks of each."""

    numbers: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Batch:
    """What is known about one run before it starts: the first position and the number of tokens of each row.

    positions  [B, S] on the device; rows with fewer than S tokens repeat their last one; [1, N] where they are packed
    """

    positions: Tensor
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    active: tuple[bool, ...] = ()
    """Rows that take tokens in this run; the others repeat what they have. Empty: all do."""
    packed: bool = False
    """Whether the tokens of all rows stand behind each other."""
    behind: Tensor | None = None
    """Of one row that stands behind as many tokens as only the device knows, and `starts` at most: [2, 2] int32, zeros
    and the number of its tokens, and of all that it sees."""

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows, and how many tokens each of them takes at most, those included that fill it up."""
        rows, tokens = self.positions.shape
        return (len(self.counts), max(self.counts)) if self.packed else (rows, tokens)

    @functools.cached_property
    def end(self) -> int:
        """One more than the largest position."""
        ends: map[int] = map(operator.add, self.starts, self.counts)
        return max(ends)

    @functools.cached_property
    def start(self) -> int | None:
        """The position at which every row starts, if that is the same one, all are active and none is filled up."""
        size = self.shape[1]
        alike = len(set(self.starts)) == 1 and all(count == size for count in self.counts) and all(self.active)
        return self.starts[0] if alike and self.behind is None else None

    def parts(self, rows: PagedRows, *, worth: float) -> list[Part]:
        """Neighbours that take as many tokens each, as long as it pays to read so much of the cache of all of them as
        the longest has.

        worth: how many cached tokens are read in vain, by each token of a row, sooner than that there is another part.
        """
        counts = self.counts if self.packed else (self.positions.shape[1],) * len(self.counts)
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        found: list[Part] = []
        first, token, longest, total = 0, 0, ends[0], ends[0]
        for last in range(1, len(ends) + 1):
            if last < len(ends):
                longest, total = max(longest, ends[last]), total + ends[last]
                in_vain = (longest * (last + 1 - first) - total) * counts[first]
                if counts[last] == counts[first] and in_vain <= worth:
                    continue
                longest = total = ends[last]
            size, count = last - first, counts[first]
            place = slice(token, token + size * count) if self.packed else slice(first, last)
            positions = self.positions[:, place].view(size, count) if self.packed else self.positions[place]
            own = Batch(positions, self.starts[first:last], self.counts[first:last], self.active[first:last])
            found.append(Part(place, own, PagedRows(rows.numbers[first:last], rows.tables[first:last])))
            first, token = last, token + size * count
        return found


@dataclass
class Part:
    """Rows of a run that attention takes together. place: of their tokens in a packed run, else of the rows.

    What is found of them once serves all layers: tables of their blocks, where their tokens lie, what they do not see.
    """

    place: slice
    batch: Batch
    rows: PagedRows
    tables: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[Any, Tensor | None] = field(default_factory=dict)
    places: Tensor | None = None

    def take(self, x: Tensor, dim: int, *, packed: bool) -> Tensor:
        """The part's own of what all rows bring: [B, .., S, ..], tokens along `dim`; packed [1, .., N, ..]."""
        if not packed:
            return x[self.place]
        rows, tokens = self.batch.positions.shape
        mine = x[0].narrow(dim - 1, self.place.start, rows * tokens)
        return mine.view(*mine.shape[: dim - 1], rows, tokens, *mine.shape[dim:]).movedim(dim - 1, 0)


def together(parts: list[Tensor], dim: int, *, packed: bool) -> Tensor:
    """What comes of the parts, as that of all rows: the other way round than `take`."""
    if not packed:
        return torch.cat(parts)
    return torch.cat([part.movedim(0, dim - 1).flatten(dim - 1, dim) for part in parts], dim - 1)[None]
