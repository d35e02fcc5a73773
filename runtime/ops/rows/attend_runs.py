"""The queries of a rank, attending to one block of keys after the other, whose positions are known before it runs.

    queries [10, 20)   keys [0, 10)     all visible: a kernel without a mask
    queries [10, 20)   keys [10, 20)    causal: a kernel that knows so
    queries [10, 20)   keys [20, 30)    nothing visible: skipped
    whatever a window or a chunk cuts   the visible keys of some queries at a time, behind a mask of that size

So a rank does as much as its queries see. Of runs that see the same keys one call is made, and one of a rank's own
tokens, zig-zag or not: they stand in order, so that each sees itself and what lies before it.

    own chunks 0 and 3, keys 0 and 3    both runs causal, one call
    own chunks 0 and 3, keys 1 and 2    run 3 sees both, one call; run 0 sees neither
    own chunks 1 and 2, keys 0 and 3    both runs see chunk 0, one call; neither sees chunk 3
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.ops.attention import allowed
from runtime.ops.rows.partial_attention import Merged, partial_attention, with_sinks
from runtime.ops.rows.token_order import Run
from runtime.ops.rows.visible import Visible, common

__all__ = ["Block", "RankQueries", "few_parts"]

_TILE = 512
"""Queries at a time where a mask is needed."""


@dataclass(frozen=True)
class Block:
    """Keys [B, G, T, D] and values [B, G, T, Dv]; `runs`: the positions of their first rows, the others are filling."""

    keys: Tensor
    values: Tensor
    runs: tuple[Run, ...]

    def mapped(self, kv_map: Sequence[int] | None) -> Block:
        """With one kv head for each query head, where these do not share them in order."""
        if kv_map is None:
            return self
        return Block(self.keys[:, list(kv_map)], self.values[:, list(kv_map)], self.runs)

    def pieces(self) -> Iterator[tuple[Run, Tensor, Tensor]]:
        at = 0
        for start, stop in self.runs:
            end = at + stop - start
            yield (start, stop), self.keys[:, :, at:end], self.values[:, :, at:end]
            at = end


class RankQueries:
    """Queries q [B, H, S, D], which stand at the positions of `runs`, and what they have seen so far.

    width: that of a value. mask: additive, broadcastable to [B, H, S, all tokens]: its keys are those of every rank, in
    order of position.
    """

    def __init__(
        self,
        q: Tensor,
        runs: Sequence[Run],
        visible: Visible,
        *,
        width: int,
        scale: float,
        softcap: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self._q, self._visible, self._mask = q, visible, mask
        self._runs: list[tuple[int, Run]] = []
        """Each with the row at which it starts."""
        at = 0
        for start, stop in runs:
            self._runs.append((at, (start, stop)))
            at += stop - start
        self._attend = functools.partial(partial_attention, scale=scale, softcap=softcap)
        self.seen = Merged(q, width)

    def add(self, block: Block) -> None:
        """Whatever of `block` these queries see."""
        parts = None
        if self._mask is None and not self._visible.is_limited:
            parts = few_parts(tuple(run for _, run in self._runs), block.runs, self._visible.causal)
        if parts is not None:
            for seeing, seen, causal in parts:
                keys, values = (each[:, :, slice(*seen)] for each in (block.keys, block.values))
                self._add(slice(*seeing), keys, values, None, causal=causal)
            return
        for keys_run, keys, values in block.pieces():
            for row, queries in self._runs:
                for piece in _split(keys_run, queries):
                    at = slice(piece[0] - keys_run[0], piece[1] - keys_run[0])
                    self._add_run(row - queries[0], queries, piece, keys[:, :, at], values[:, :, at])

    def add_masked(self, keys: Tensor, values: Tensor, positions: Tensor, held: Tensor) -> None:
        """Keys at the positions `held` [B or 1, T], queries at `positions` [B or 1, S]: what the host does not know."""
        limits = self._visible
        for start in range(0, self._q.shape[2], _TILE):
            rows = slice(start, min(start + _TILE, self._q.shape[2]))
            seen = allowed(
                positions[:, rows, None], held[:, None], causal=limits.causal, window=limits.window, chunk=limits.chunk
            )
            hidden, extra = _minus_infinity(~seen, self._q)[:, None], self._extra(rows, (0, keys.shape[2]))
            self._add(rows, keys, values, hidden if extra is None else extra + hidden)

    def result(self, sinks: Tensor | None) -> Tensor:
        """What they have seen, [B, H, S, Dv] in the dtype of the queries."""
        if sinks is None:
            return self.seen.rounded(self._q.dtype)
        return with_sinks(self.seen.out, self.seen.lse, sinks).to(self._q.dtype)

    def _add_run(self, shift: int, queries: Run, keys_run: Run, keys: Tensor, values: Tensor) -> None:
        """One run of keys, none of which lies before some of the queries and behind others, unless they are the same.

        shift: what makes a row of a query's position.
        """
        visible = common(keys_run, self._visible.any_of(queries))
        if visible is None:
            return
        rows = slice(queries[0] + shift, queries[1] + shift)
        at = slice(visible[0] - keys_run[0], visible[1] - keys_run[0])
        low, high = self._visible.all_of(queries)
        if low <= visible[0] and visible[1] <= high:
            self._add(rows, keys[:, :, at], values[:, :, at], self._extra(rows, visible))
        elif self._visible.causal and visible == queries and low <= visible[0]:
            self._add(rows, keys[:, :, at], values[:, :, at], self._extra(rows, visible), causal=True)
        elif queries[1] - queries[0] > _TILE:
            for start in range(*queries, _TILE):
                tile = (start, min(start + _TILE, queries[1]))
                self._add_run(shift, tile, visible, keys[:, :, at], values[:, :, at])
        else:
            limits, device = self._visible, self._q.device
            seen = allowed(
                torch.arange(*queries, device=device)[:, None], torch.arange(*visible, device=device),
                causal=limits.causal, window=limits.window, chunk=limits.chunk,
            )  # fmt: skip
            hidden, extra = _minus_infinity(~seen, self._q), self._extra(rows, visible)
            self._add(rows, keys[:, :, at], values[:, :, at], hidden if extra is None else extra + hidden)

    def _add(self, rows: slice, keys: Tensor, values: Tensor, mask: Tensor | None, *, causal: bool = False) -> None:
        out, lse = self._attend(self._q[:, :, rows], keys, values, causal=causal, mask=mask)
        self.seen.add(out, lse, rows)

    def _extra(self, rows: slice, keys: Run) -> Tensor | None:
        """What the given mask says of these."""
        if self._mask is None:
            return None
        mask = self._mask.to(self._q.dtype)
        mask = mask if mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., rows, :]
        return mask if mask.shape[-1] == 1 else mask[..., slice(*keys)]


@functools.lru_cache(maxsize=4096)
def few_parts(
    queries: tuple[Run, ...], keys: tuple[Run, ...], causal: bool
) -> tuple[tuple[tuple[int, int], tuple[int, int], bool], ...] | None:
    """(rows of queries, rows of keys, causal) that are together what queries see, without a window or a chunk.

    Both stand at the positions of their runs, queries ascending. None: runs overlap and are not the same.
    """
    count, num_keys = _num(queries), _num(keys)
    if not count or not num_keys:
        return ()
    if not causal:
        return (((0, count), (0, num_keys), False),)
    before = keys[: -len(queries)] if keys[-len(queries) :] == queries else None
    if before is not None and all(stop <= queries[0][0] for _, stop in before):
        past = _num(before)
        own = ((0, count), (past, num_keys), True)
        return (own,) if not past else (((0, count), (0, past), False), own)
    found: list[tuple[tuple[int, int], tuple[int, int], bool]] = []
    at = 0
    for start, stop in queries:
        relations = [_is_before(each, (start, stop)) for each in keys]
        seen = sum(1 for each in relations if each)
        if None in relations or not all(relations[:seen]):
            return None
        end, rows = _num(keys[:seen]), (at, at + stop - start)
        at = rows[1]
        if end and found and found[-1][1] == (0, end):
            found[-1] = ((found[-1][0][0], rows[1]), (0, end), False)
        elif end:
            found.append((rows, (0, end), False))
    return tuple(found)


def _is_before(keys: Run, queries: Run) -> bool | None:
    """Whether all keys lie before all queries; False: all behind; None: they overlap."""
    return True if keys[1] <= queries[0] else (False if keys[0] >= queries[1] else None)


def _num(runs: Sequence[Run]) -> int:
    return sum(stop - start for start, stop in runs)


def _split(keys: Run, queries: Run) -> Iterator[Run]:
    """The keys before the queries, those that stand with them, and those behind."""
    ends = (keys[0], min(max(queries[0], keys[0]), keys[1]), max(min(queries[1], keys[1]), keys[0]), keys[1])
    for start, stop in itertools.pairwise(ends):
        if start < stop:
            yield start, stop


def _minus_infinity(hidden: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill(hidden, -torch.inf)
