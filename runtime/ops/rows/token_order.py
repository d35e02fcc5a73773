"""Which rank has which tokens of a sequence.

    blocks    rank 0 has the first ceil(T / n), rank 1 the next, ..    0 0 0 1 1 1 2 2 2
    zigzag    2 n chunks; rank i has chunks i and 2 n - 1 - i          0 1 2 2 1 0

A causal query sees the keys before it, so with blocks the last rank would work longest. In zig-zag order each rank has
one chunk of early tokens and one of late ones, whose work is the same together (Brandon et al., arXiv:2311.09431, for
the problem; Dubey et al., arXiv:2407.21783, section 3.3.2, for this order).

Chunks differ by one token at most, and nothing is filled up: a rank may have fewer tokens than another, or none. What
is left over makes early chunks one token longer, where that costs least; or all late chunks, which is even.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

from partitioner.errors import LayoutError

__all__ = ["Kind", "Run", "TokenOrder"]

Kind = Literal["blocks", "zigzag"]

Run = tuple[int, int]
"""Positions that follow each other, half open."""


@dataclass(frozen=True)
class TokenOrder:
    """How `total` tokens are shared out between `parts` ranks."""

    total: int
    parts: int
    kind: str = "zigzag"

    def __post_init__(self) -> None:
        if self.kind not in ("blocks", "zigzag"):
            raise LayoutError(f"tokens are shared out as 'blocks' or in 'zigzag' order, not {self.kind!r}")

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(total: int, parts: int, kind: str = "zigzag") -> TokenOrder:
        """One object for each, which keeps what it has worked out."""
        return TokenOrder(total, parts, kind)

    @functools.cached_property
    def runs(self) -> tuple[tuple[Run, ...], ...]:
        """What each rank has, ascending; a run of no tokens is left out."""
        if self.kind == "blocks":
            each = -(-self.total // self.parts)
            cuts = [min(each * index, self.total) for index in range(self.parts + 1)]
            chunks, mine = [*itertools.pairwise(cuts)], [(index,) for index in range(self.parts)]
        else:
            cuts = [0, *itertools.accumulate(self._chunk_sizes)]
            chunks = [*itertools.pairwise(cuts)]
            mine = [(index, 2 * self.parts - 1 - index) for index in range(self.parts)]  # type: ignore[misc]
        return tuple(tuple(chunks[at] for at in those if chunks[at][0] < chunks[at][1]) for those in mine)

    @property
    def _chunk_sizes(self) -> list[int]:
        size, left = divmod(self.total, 2 * self.parts)
        late, early = divmod(left, self.parts)
        return [size + (index < early) for index in range(self.parts)] + [size + late] * self.parts

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """How many each rank has."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    def positions(self, rank: int) -> list[int]:
        """Those of `rank`, ascending."""
        return [position for run in self.runs[rank] for position in range(*run)]

    def place(self, position: int) -> tuple[int, int]:
        """Who has a position, and which of its tokens it is."""
        for rank, runs in enumerate(self.runs):
            before = 0
            for start, stop in runs:
                if start <= position < stop:
                    return rank, before + position - start
                before += stop - start
        raise LayoutError(f"there is no position {position} among {self.total} tokens")

    @functools.cached_property
    def joined(self) -> tuple[tuple[int, int], ...]:
        """Where the runs lie once the tokens of all ranks stand one after the other, in order of position."""
        starts = [0, *itertools.accumulate(self.counts)]
        found = []
        for at, runs in zip(starts, self.runs, strict=False):
            for start, stop in runs:
                found.append((start, at, at + stop - start))
                at += stop - start
        return tuple((at, end) for _, at, end in sorted(found))
