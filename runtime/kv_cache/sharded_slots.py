"""Slots of a cache whose tokens ranks share out: who has a token, and in which slot.

    a run that deals its tokens out   each rank keeps those that it has, in the order in which they come
    a run that every rank has all of  the token at position p is kept by rank p % n

    slot      how many of the row's tokens the rank has kept before, modulo the slots
    held      [n, B, slots + 1]   which position lies in each slot of each rank, a far one where none does

Both are the same on every rank, of all ranks, so that nobody has to say which tokens came with some keys. The last slot
takes what must be kept nowhere: tokens of others, and filling. It is never looked at.

A slot depends on the position alone: of each row are known the position behind the last tokens that were dealt out, and
how many each rank had kept by then. So a run that is repeated writes what it has written, and one on a GPU needs no
host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.kv_cache.batch import Batch
from runtime.kv_cache.slots import minus_infinity, slots_of
from runtime.ops.rows.token_order import Run, TokenOrder
from runtime.program.shards import StateShard

__all__ = [
    "FAR",
    "Appended",
    "DealtOut",
    "KeptTokens",
    "ShardedRun",
    "cache_bytes",
    "moved",
    "sharded_slots",
    "uneven_prefix",
]

_UNEVEN_RUNS = 32
"""How many runs may be no multiple of the ranks, besides those of the largest size."""

FAR = 2**62
"""A position behind all queries: what no causal one sees."""


def sharded_slots(state: StateShard, *, max_length: int, step: int, parts: int) -> int:
    """How many slots a row needs on one of `parts` ranks, of texts up to `max_length` in runs of at most `step`.

    Runs of a multiple of `parts` tokens are dealt out evenly; of another one a rank may get one token more. The tokens
    of a row that ends within a run may all be one rank's. A layer that sees n positions back needs n - 1 of them, all
    of which may be one rank's, and what comes in one run.
    """
    each = -(-step // parts)
    uneven = 0 if step % parts == 0 or step >= max_length else -(-max_length // step)
    every = min(max_length, -(-max_length // parts) + uneven + _UNEVEN_RUNS + each)
    return every if state.sees is None else min(every, state.sees - 1 + each)


def uneven_prefix(step: int, parts: int) -> int:
    """How many tokens more than its share a rank may have of a prefix behind which a text of any length goes on.

    What is behind it is dealt out evenly, but for the last piece of a prompt and the last round of single tokens.
    """
    return -(-step // parts) // 2 + _UNEVEN_RUNS // 2


def cache_bytes(states: Sequence[StateShard], *, max_batch: int, max_length: int, step: int, parts: int = 1) -> int:
    """What a cache of these sizes takes on this rank; `parts`: how many ranks share out the tokens, if they do."""

    def count(state: StateShard) -> int:
        if not state.per_token:
            return 1
        if not state.token_axes:
            return slots_of(state, max_length=max_length, step=step)
        return sharded_slots(state, max_length=max_length, step=step, parts=parts) + 1

    return sum(max_batch * count(state) * state.bytes for state in states)


class Appended(NamedTuple):
    """Of a run that every rank has all of, what one of them keeps; tensors [B, S]."""

    slots: dict[int, Tensor]
    """By number of slots."""
    is_own: Tensor
    before: Tensor
    """How many tokens of the row it has kept before that position."""


class KeptTokens:
    """Which tokens each of `parts` ranks has kept, of each of `max_batch` rows."""

    def __init__(self, counts: Sequence[int], *, max_batch: int, parts: int, device: torch.device) -> None:
        """`counts`: the numbers of slots that there are."""
        self.parts, self._device = parts, device
        self.held = {
            count: torch.full((parts, max_batch, count + 1), FAR, dtype=torch.int64, device=device) for count in counts
        }
        self.ends = [0] * max_batch
        """Of each row, the position behind the last tokens that were dealt out."""
        self.kept = [[0] * max_batch for _ in range(parts)]
        """How many each rank had kept of it by then."""
        self._ends = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self._kept = torch.zeros(parts, max_batch, dtype=torch.int64, device=device)
        self._rows = torch.arange(max_batch, device=device)[:, None]
        self._ranks = torch.arange(parts, device=device)

    def forget(self, rows: slice) -> None:
        """New sequences come in `rows`."""
        for held in self.held.values():
            held[:, rows] = FAR
        for row in range(*rows.indices(len(self.ends))):
            self.ends[row] = 0
            for kept in self.kept:
                kept[row] = 0
        self._ends[rows] = 0
        self._kept[:, rows] = 0

    def take_over(self, row: int, source: int, length: int) -> list[int]:
        """`row` has the first `length` tokens of `source`, as its own; how many each rank has of them.

        Nothing has been given up of `source`: on each rank they lie in the first slots.
        """
        counts: list[int] = []
        for count, held in self.held.items():
            found = held[:, source, :count].clone()
            counts = (found < length).sum(1).tolist()
            assert sum(counts) == length, f"{sum(counts)} of {length} tokens of row {source} are there"
            held[:, row, :count] = found.masked_fill(found >= length, FAR)
            held[:, row, count] = FAR
        self.ends[row] = length
        self._ends[row] = length
        for rank, each in enumerate(counts):
            self.kept[rank][row] = each
        self._kept[:, row] = torch.tensor(counts)
        return counts

    def count(self, rank: int, row: int, position: int) -> int:
        """How many tokens `rank` has kept of a row that goes up to `position`."""
        end = self.ends[row]
        later = (position - rank + self.parts - 1) // self.parts - (end - rank + self.parts - 1) // self.parts
        return self.kept[rank][row] + (later if position > end else 0)

    def most(self, rows: slice, ends: Sequence[int]) -> int:
        """The most that a rank has kept of one of `rows`, which go up to `ends`."""
        numbers = range(*rows.indices(len(self.ends)))
        return max(
            self.count(rank, row, end) for rank in range(self.parts) for row, end in zip(numbers, ends, strict=True)
        )

    def deal_out(self, tokens: Batch, rows: slice, order: TokenOrder) -> dict[int, Tensor]:
        """A run whose tokens are dealt out in `order`. By number of slots, the slot of each on its rank: [B, S]."""
        numbers = range(*rows.indices(len(self.ends)))
        active = tokens.active or (True,) * len(numbers)
        self._require_next(tokens, numbers, active)
        ends, firsts = list(self.ends), [list(each) for each in self.kept]
        for at, row in enumerate(numbers):
            if not active[at]:
                continue
            start, stop = tokens.starts[at], tokens.starts[at] + tokens.counts[at]
            for rank in range(self.parts):
                firsts[rank][row] = self.count(rank, row, start)
            ends[row] = stop
        kept = [list(each) for each in firsts]
        for at, row in enumerate(numbers):
            for rank in range(self.parts) if active[at] else ():
                runs = order.runs[rank]
                kept[rank][row] += sum(max(0, min(stop, tokens.counts[at]) - start) for start, stop in runs)
        before = self._sent(firsts)[:, rows]
        rank_of, index_of = self._places(order)
        counts = self._sent([n if on else 0 for n, on in zip(tokens.counts, active, strict=True)])
        offsets = torch.arange(order.total, device=self._device)
        is_token = offsets < counts[:, None]
        place = before[rank_of].t() + index_of
        positions = self._sent(tokens.starts)[:, None] + offsets
        slots = self._note(rank_of.expand_as(place), rows, place, positions, is_token)
        self.ends, self.kept = ends, kept
        self._ends.copy_(self._sent(ends))
        self._kept.copy_(self._sent(kept))
        return slots

    def append(self, positions: Tensor, rows: slice, own: int, active: Sequence[bool] = ()) -> Appended:
        """A run that every rank has all of, at `positions` [B, S], as rank `own` sees it; active: as in `Batch`."""
        rank = positions % self.parts
        ends, row = self._ends[rows, None], self._rows[rows].expand_as(positions)
        # how many positions of that rank lie before each, without those before the row's `end`
        later = (positions - rank + self.parts - 1) // self.parts - (ends - rank + self.parts - 1) // self.parts
        is_new = positions >= ends
        if not all(active):
            is_new = is_new & torch.tensor(active, device=self._device)[:, None]
        slots = self._note(rank, rows, self._kept[rank, row] + later, positions, is_new)
        before = self._kept[own, row] + (positions - own + self.parts - 1) // self.parts
        before = before - (ends - own + self.parts - 1) // self.parts
        is_own = (rank == own) & is_new
        return Appended({count: torch.where(is_own, each, count) for count, each in slots.items()}, is_own, before)

    def _note(self, rank: Tensor, rows: slice, place: Tensor, positions: Tensor, is_token: Tensor) -> dict[int, Tensor]:
        row, found = self._rows[rows].expand_as(place), {}
        for count, held in self.held.items():
            found[count] = torch.where(is_token, place % count, count)
            held[rank, row, found[count]] = positions
        return found

    def _places(self, order: TokenOrder) -> tuple[Tensor, Tensor]:
        """Of each token of a run, which rank has it, and which of that rank's it is."""
        rank_of, index_of = torch.empty(2, order.total, dtype=torch.int64, device=self._device).unbind(0)
        for rank, runs in enumerate(order.runs):
            index = 0
            for start, stop in runs:
                rank_of[start:stop] = rank
                torch.arange(index, index + stop - start, out=index_of[start:stop])
                index += stop - start
        return rank_of, index_of

    def _sent(self, numbers: Sequence[Any]) -> Tensor:
        """On the device, whose work before the host does not wait for."""
        given = torch.tensor(numbers)
        return given.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else given

    def _require_next(self, tokens: Batch, numbers: range, active: Sequence[bool]) -> None:
        for row, start, on in zip(numbers, tokens.starts, active, strict=True):
            if on and start < self.ends[row]:
                raise InputError(
                    f"row {row} of a cache that ranks share out goes on at position {self.ends[row]}, not at {start}: "
                    "begin another text with start()"
                )


@dataclass(frozen=True)
class DealtOut:
    """What is known of a run in which each rank has its own tokens."""

    order: TokenOrder
    tokens: tuple[Tensor, ...]
    """Which of the run's tokens each rank has."""
    has_past: bool
    """Whether anything was kept before."""
    start: int
    before: tuple[int, ...] | None
    """How many tokens each rank had kept, where that is the same for all rows, which go on at `start` together."""

    def runs_of(self, rank: int, *, is_limited: bool) -> tuple[tuple[int, int], ...] | None:
        """Where the tokens stand that `rank` keeps, in order of slot; None where only the cache's positions tell.

        is_limited: whether some are seen no more, so that slots may have been written twice.
        """
        if self.before is None or is_limited:
            return None
        runs = ((0, self.before[rank]), *moved(self.order.runs[rank], self.start))
        return tuple(each for each in runs if each[0] < each[1])


@dataclass
class ShardedRun:
    """What the cache knows of a run before it starts."""

    rows: slice
    positions: Tensor
    """[B, S], of all its tokens."""
    slots: dict[int, Tensor]
    """By number of slots: where the tokens of this rank are kept, [B, S] or, if they are dealt out, [B, S_i]."""
    seen: int
    """How many slots of a rank are looked at, at most."""
    kept: KeptTokens
    dealt_out: DealtOut | None = None
    appended: Appended | None = None
    """What is known of a run that every rank has all of, in the place of that."""
    masks: dict[Any, Tensor] = field(default_factory=dict)

    def held(self, count: int) -> Tensor:
        """Which positions lie in the slots that are looked at, of every rank: [n, B, T]."""
        return self.kept.held[count][:, self.rows, : min(self.seen, count)]

    def hidden(self, rank: int, count: int, window: int | None, chunk: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, S, T], added to the scores of all tokens for what `rank` keeps."""
        key = (rank, count, window, chunk, dtype)
        if key not in self.masks:
            self.masks[key] = minus_infinity(self.positions, self.held(count)[rank][:, None], window, chunk, dtype)
        return self.masks[key]


def moved(runs: tuple[Run, ...], by: int) -> tuple[Run, ...]:
    return tuple((first + by, last + by) for first, last in runs)
