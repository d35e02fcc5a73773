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
from collections.abc import Sequence

import torch
from torch import Tensor

from partitioner.errors import LayoutError

__all__ = ["Run", "TokenOrder"]

Run = tuple[int, int]
"""Positions that follow each other, half open."""


class TokenOrder:
    """How `total` tokens are shared out between `parts` ranks: `TokenOrder.of` gives one object for each."""

    def __init__(self, total: int, parts: int, kind: str = "zigzag") -> None:
        if kind not in ("blocks", "zigzag"):
            raise LayoutError(f"tokens are shared out as 'blocks' or in 'zigzag' order, not {kind!r}")
        self.total, self.parts = total, parts
        self._share_out(_blocks(total, parts) if kind == "blocks" else _zigzag(total, parts))

    @classmethod
    def from_runs(cls, runs: Sequence[Sequence[Run]]) -> TokenOrder:
        """Ranks that have the tokens of `runs`, each ascending, which need not be all that there are."""
        order = cls(sum(stop - start for start, stop in itertools.chain(*runs)), len(runs))
        order._share_out(tuple(map(tuple, runs)))
        return order

    def _share_out(self, runs: tuple[tuple[Run, ...], ...]) -> None:
        self.runs = runs
        """What each rank has, ascending; a run of no tokens is left out."""
        self.counts = tuple(sum(stop - start for start, stop in runs) for runs in self.runs)
        """How many each rank has."""
        at, found = 0, []
        for start, stop in itertools.chain(*self.runs):
            found.append((start, at, at + stop - start))
            at += stop - start
        self.joined = tuple((at, end) for _, at, end in sorted(found))
        """Where the runs lie once the tokens of all ranks stand one after the other, in order of position."""

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(total: int, parts: int, kind: str = "zigzag") -> TokenOrder:
        return TokenOrder(total, parts, kind)

    def positions(self, rank: int) -> list[int]:
        """Those of `rank`, ascending."""
        return [position for run in self.runs[rank] for position in range(*run)]

    def held(self, rank: int, device: torch.device) -> Tensor:
        """The same on the device, int64 [S_i]: made there, so that its host waits for nothing."""
        runs = [torch.arange(start, stop, device=device) for start, stop in self.runs[rank]]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device=device)

    def place(self, position: int) -> tuple[int, int]:
        """Who has a position, and which of its tokens it is."""
        for rank, runs in enumerate(self.runs):
            before = 0
            for start, stop in runs:
                if start <= position < stop:
                    return rank, before + position - start
                before += stop - start
        raise LayoutError(f"there is no position {position} among {self.total} tokens")


def _blocks(total: int, parts: int) -> tuple[tuple[Run, ...], ...]:
    each = -(-total // parts)
    cuts = [min(each * index, total) for index in range(parts + 1)]
    return tuple(((start, stop),) if start < stop else () for start, stop in itertools.pairwise(cuts))


def _zigzag(total: int, parts: int) -> tuple[tuple[Run, ...], ...]:
    size, left = divmod(total, 2 * parts)
    late, early = divmod(left, parts)
    sizes = [size + (index < early) for index in range(parts)] + [size + late] * parts
    chunks = [*itertools.pairwise(itertools.accumulate(sizes, initial=0))]
    return tuple(
        tuple(chunks[at] for at in (index, 2 * parts - 1 - index) if chunks[at][0] < chunks[at][1])
        for index in range(parts)
    )
