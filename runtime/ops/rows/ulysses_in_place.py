"""Heads exchanged for tokens by ranks that write into each other's memory: each row once, to where it is read.

    there    q [B, H, S_i, D], k, v [B, G, P_i + S_i, ..]  ->  [B, H_i, S, D], [B, G_i, P + S, ..] in each rank's memory
    back     out [B, H_i, S, Dv]                           ->  [B, H, S_i, Dv], which lies as [B, S_i, H, Dv]

What a rank's memory holds: queries, keys and values of its heads, all tokens in order of position, behind what is kept
of earlier ones (P, rank by rank); in an area of its own, what comes back of the heads of others. Three kernels and two
meetings there and back: the bytes of two all-to-alls over links, and one pass over a rank's own in the place of five.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.ops.rows.row_moves import ALIGNED, Move, loadable
from runtime.ops.rows.token_order import Run, TokenOrder

__all__ = ["InPlace", "groups_of"]

_APART = 256
GROUPS = 2
"""Of heads: while one is attended to, the next comes and the one before goes back."""
LEAST_BYTES = 1 << 25
"""Of a rank's queries, from which groups pay for being more kernels."""
BESIDE = 64
"""Programs of a kernel that writes rows while others compute."""
BY_COPIES = False
"""Whether copy engines do it, in the place of that kernel."""


@dataclass(frozen=True)
class InPlace:
    """One exchange of heads between the ranks of `order`, as all of them know it.

    query, kv: of each rank, which query heads it attends with, half open, and which kv heads these read. past: how many
    earlier tokens each rank has kept, which stand before the others in its keys and values. item: bytes of a number.
    """

    order: TokenOrder
    query: tuple[Run, ...]
    kv: tuple[tuple[int, ...], ...]
    past: tuple[int, ...]
    batch: int
    size: int
    value: int
    item: int

    @classmethod
    def of(cls, rows: Any, order: TokenOrder, q: Tensor, k: Tensor, v: Tensor, **shares: Any) -> InPlace | None:
        """None where they cannot be written so, on any rank alike; a collective where memory must grow."""
        if any(len(runs) > 2 for runs in order.runs) or len({q.dtype, k.dtype, v.dtype}) != 1:
            return None
        item = q.element_size()
        if q.shape[-1] * item % ALIGNED or v.shape[-1] * item % ALIGNED or not q.shape[0]:
            return None
        made = ByCopies if BY_COPIES else cls
        found = made(order, batch=q.shape[0], size=q.shape[-1], value=v.shape[-1], item=item, **shares)
        return found if rows.require(found.areas) else None

    # -- where things lie ----------------------------------------------------------------------------------------------

    @property
    def keys(self) -> int:
        return sum(self.past) + self.order.total

    @property
    def heads(self) -> int:
        return max((stop for _, stop in self.query), default=0)

    def count(self, rank: int) -> int:
        return self.query[rank][1] - self.query[rank][0]

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """What comes to a rank: queries, keys and values."""
        kv = (self.batch, len(self.kv[rank]), self.keys)
        return (self.batch, self.count(rank), self.order.total, self.size), (*kv, self.size), (*kv, self.value)

    def starts(self, rank: int) -> tuple[int, ...]:
        """In bytes, and the end."""
        found = [0]
        for shape in self.shapes(rank):
            found.append(_up(found[-1] + math.prod(shape) * self.item))
        return tuple(found)

    def returned(self, rank: int) -> tuple[int, ...]:
        """What comes back to a rank, of the heads of others."""
        return self.batch, self.order.counts[rank], self.heads - self.count(rank), self.value

    @property
    def areas(self) -> tuple[int, int]:
        """Bytes of every rank's memory: for what comes there, and for what comes back."""
        ranks = range(self.order.parts)
        returned = max(math.prod(self.returned(rank)) for rank in ranks) * self.item
        return max(self.starts(rank)[-1] for rank in ranks), returned

    # -- what is written -----------------------------------------------------------------------------------------------

    def groups(self, rank: int, count: int) -> list[tuple[Run, Run]]:
        """A rank's query and kv heads in `count` groups, by their places."""
        heads, kv = self.count(rank), len(self.kv[rank])
        return [
            ((heads * at // count, heads * (at + 1) // count), (kv * at // count, kv * (at + 1) // count))
            for at in range(count)
        ]

    def there(self, own: int, group: int = 0, count: int = 1) -> Iterator[Move]:
        """Of the rank `own`, for one of `count` groups of each rank's heads."""
        before, all_past = sum(self.past[:own]), sum(self.past)
        for rank in range(self.order.parts):
            shapes, starts = self.shapes(rank), self.starts(rank)
            query, kv = self.groups(rank, count)[group]
            first = self.query[rank][0]
            for source, places in enumerate((range(*query), range(*kv), range(*kv))):
                width, keys, past = shapes[source][-1] * self.item, shapes[source][2], (source > 0) * self.past[own]
                cut, moved = _moved(self.order.runs[own], by=all_past if source else 0)
                batch = math.prod(shapes[source][1:]) * self.item
                for place in places:
                    head = self.kv[rank][place] if source else first + place
                    to = (source, head, rank, starts[source] + place * keys * width, batch, width)
                    yield Move(*to, self.order.counts[own], cut, (past, past), moved, width)
                    if past:
                        yield Move(*to, past, past, (0, 0), (before, before), width)

    def back(self, own: int, area: int, group: int = 0, count: int = 1) -> Iterator[Move]:
        """Of the rank `own`, whose own part goes to its result; `area`: where what comes back begins."""
        width, first = self.value * self.item, self.query[own][0]
        (start, stop), _ = self.groups(own, count)[group]
        for rank in range(self.order.parts):
            is_own, (low, high) = rank == own, self.query[rank]
            heads = self.heads if is_own else self.returned(rank)[2]
            cut, moved = _moved(self.order.runs[rank])
            for head in range(first + start, first + stop):
                place = head if is_own or head < low else head - (high - low)
                at = place * width + (0 if is_own else area)
                row, rows = heads * width, self.order.counts[rank]
                yield Move(0, head - first - start, rank, at, rows * row, row, rows, cut, moved, (0, 0), width)

    # -- the exchange --------------------------------------------------------------------------------------------------

    def run(
        self,
        rows: Any,
        own: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        count: int = 1,
    ) -> Tensor:
        """`attend(q, k, v)` with this rank's heads over all tokens, [B, H_i, S, Dv]; back come its own tokens.

        count: groups of heads, each attended to while the next comes and the one before goes back.
        """
        area: int = rows.second
        sources = [loadable(x) for x in (q, k, v)]
        result = q.new_empty(self.batch, self.order.counts[own], self.heads, self.value)
        longest, most = max(self.order.counts[own], self.past[own]), max(self.order.counts)

        def there(group: int, programs: int | None) -> None:
            table = rows.table((self, "there", group, count), lambda: [*self.there(own, group, count)])
            rows.write(table, sources, longest, programs=programs)
            rows.meet()

        def back(group: int, out: Tensor, programs: int | None) -> None:
            table = rows.table((self, area, group, count), lambda: [*self.back(own, area, group, count)])
            rows.write(table, [out], most, own=result, programs=programs)
            rows.meet()

        there(0, None)
        coming = [rows.begin(functools.partial(there, group, BESIDE)) for group in range(1, count)]
        whole = [
            _view(rows.memory, start, shape, q.dtype)
            for start, shape in zip(self.starts(own), self.shapes(own), strict=False)
        ]
        going, kept = [], []
        for group, (query, kv) in enumerate(self.groups(own, count)):
            if group:
                rows.finish(coming[group - 1])
            out = attend(whole[0][:, slice(*query)], whole[1][:, slice(*kv)], whole[2][:, slice(*kv)])
            kept.append(loadable(out.to(q.dtype)))  # until nobody reads it any more
            if group + 1 < count:
                going.append(rows.begin(functools.partial(back, group, kept[-1], BESIDE)))
        for each in going:
            rows.finish(each)
        back(count - 1, kept[-1], None)
        came = _view(rows.memory, area, self.returned(own), q.dtype)
        first, last = self.query[own]
        if first:
            result[:, :, :first] = came[:, :, :first]
        if last < self.heads:
            result[:, :, last:] = came[:, :, first:]
        return result.transpose(1, 2)


@dataclass(frozen=True)
class ByCopies(InPlace):
    """The same by copy engines, which take lines of bytes: tokens with some of their heads.

    So what comes, and what comes back, lies as [B, S, H, D]. Keys and values behind earlier ones come from a cache,
    which has the tokens of a head beside each other, and lie so.
    """

    def returned(self, rank: int) -> tuple[int, ...]:
        """What comes back to a rank, of all heads."""
        return self.batch, self.heads, self.order.counts[rank], self.value

    def lies_by_tokens(self, source: int) -> bool:
        return source == 0 or not any(self.past)

    def coming(self, memory: Tensor, rank: int, dtype: torch.dtype) -> list[Tensor]:
        """Queries, keys and values in the memory of a rank, [B, H_i, S, D]."""
        return [
            _lying(memory, start, shape, dtype, by_tokens=self.lies_by_tokens(source))
            for source, (start, shape) in enumerate(zip(self.starts(rank), self.shapes(rank), strict=False))
        ]

    def put(self, rows: Any, own: int, sources: Sequence[Tensor], group: int, count: int) -> None:
        """There: this rank's tokens of one of `count` groups of every rank's heads."""
        for rank in _others_first(own, self.order.parts):
            targets = self.coming(rows.memories[rank], rank, sources[0].dtype)
            query, kv = self.groups(rank, count)[group]
            first = self.query[rank][0]
            for source, (x, target) in enumerate(zip(sources, targets, strict=True)):
                heads = self.kv[rank] if source else tuple(range(first, first + self.count(rank)))
                for places in _adjacent(heads, kv if source else query):
                    start, stop = heads[places.start], heads[places.stop - 1] + 1
                    for read, written in self._tokens(own, behind_past=source > 0):
                        rows.copy(target[:, places, written], x[:, start:stop, read])

    def _tokens(self, own: int, *, behind_past: bool) -> Iterator[tuple[slice, slice]]:
        """Where a rank's tokens lie in what it brings, and among those of all ranks."""
        before, after = (sum(self.past[:own]), sum(self.past)) if behind_past else (0, 0)
        at = self.past[own] if behind_past else 0
        if at:
            yield slice(0, at), slice(before, before + at)
        for start, stop in self.order.runs[own]:
            yield slice(at, at + stop - start), slice(after + start, after + stop)
            at += stop - start

    def run(
        self,
        rows: Any,
        own: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        count: int = 1,
    ) -> Tensor:
        """As above."""
        area: int = rows.second
        ranks = _others_first(own, self.order.parts)
        sources = [_by_lines(x, by_tokens=self.lies_by_tokens(source)) for source, x in enumerate((q, k, v))]
        result = q.new_empty(self.batch, self.order.counts[own], self.heads, self.value).transpose(1, 2)
        came = _lying(rows.memory, area, self.returned(own), q.dtype, by_tokens=True)

        def there(group: int) -> None:
            self.put(rows, own, sources, group, count)
            rows.meet()

        def back(group: int, out: Tensor) -> None:
            start, stop = (self.query[own][0] + place for place in self.groups(own, count)[group][0])
            for rank in ranks:
                target = result
                if rank != own:
                    target = _lying(rows.memories[rank], area, self.returned(rank), q.dtype, by_tokens=True)
                at = 0
                for first, last in self.order.runs[rank]:
                    rows.copy(target[:, start:stop, at : at + last - first], out[:, :, first:last])
                    at += last - first
            rows.meet()
            for rank in ranks[:-1]:
                start, stop = (self.query[rank][0] + place for place in self.groups(rank, count)[group][0])
                rows.copy(result[:, start:stop], came[:, start:stop])

        there(0)
        coming = [rows.begin(functools.partial(there, group)) for group in range(1, count)]
        whole, going, kept = self.coming(rows.memory, own, q.dtype), [], []
        for group, (query, kv) in enumerate(self.groups(own, count)):
            if group:
                rows.finish(coming[group - 1])
            out = attend(whole[0][:, slice(*query)], whole[1][:, slice(*kv)], whole[2][:, slice(*kv)])
            kept.append(_by_lines(out.to(q.dtype), by_tokens=True))  # until nobody reads it any more
            if group + 1 < count:
                going.append(rows.begin(functools.partial(back, group, kept[-1])))
        for each in going:
            rows.finish(each)
        back(count - 1, kept[-1])
        return result


def groups_of(kv: Sequence[Sequence[int]], q: Tensor) -> int:
    """In how many groups each rank's heads come: as many as pay, and as all ranks have kv heads for."""
    if q.nbytes < LEAST_BYTES:
        return 1
    found = 1
    for count in range(2, GROUPS + 1):
        if all(each and len(each) % count == 0 for each in kv):
            found = count
    return found


def _view(memory: Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)


def _lying(memory: Tensor, start: int, shape: Sequence[int], dtype: torch.dtype, *, by_tokens: bool) -> Tensor:
    """[B, H, S, D] of some memory, where the heads of a token lie beside each other, or the tokens of a head."""
    batch, heads, tokens, width = shape
    if not by_tokens:
        return _view(memory, start, shape, dtype)
    return _view(memory, start, (batch, tokens, heads, width), dtype).transpose(1, 2)


def _by_lines(x: Tensor, *, by_tokens: bool) -> Tensor:
    """What is [B, H, S, D], so that the heads of a token lie beside each other, or the tokens of a head."""
    if by_tokens:
        return x if x.stride(3) == 1 and x.stride(1) == x.shape[3] else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _others_first(own: int, parts: int) -> list[int]:
    """So that ranks do not all write into one."""
    return [(own + step) % parts for step in range(1, parts + 1)]


def _adjacent(heads: Sequence[int], places: Run) -> Iterator[slice]:
    """The places in pieces, whose heads follow each other."""
    first = places[0]
    for place in range(*places):
        if place + 1 == places[1] or heads[place + 1] != heads[place] + 1:
            yield slice(first, place + 1)
            first = place + 1


def _moved(runs: Sequence[Run], *, by: int = 0) -> tuple[int, tuple[int, int]]:
    """Of what stands in the one or two `runs`: the first row of the second, and what makes a row a position."""
    if not runs:
        return 0, (by, by)
    cut = runs[0][1] - runs[0][0]
    second = runs[1][0] - cut if len(runs) > 1 else runs[0][0]
    return cut, (runs[0][0] + by, second + by)


def _up(num_bytes: int) -> int:
    return -(-num_bytes // _APART) * _APART
