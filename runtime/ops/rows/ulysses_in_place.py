"""Heads exchanged for tokens by ranks that write into each other's memory: each row once, to where it is read.

    there    q [B, H, S_i, D], k, v [B, G, P_i + S_i, ..]  ->  [B, H_i, S, D], [B, G_i, P + S, ..] in each rank's memory
    back     out [B, H_i, S, Dv]                           ->  [B, H, S_i, Dv], which lies as [B, S_i, H, Dv]

What a rank's memory holds: queries, keys and values of its heads, all tokens in order of position, behind what is kept
of earlier ones (P, rank by rank); in an area of its own, what comes back of the heads of others. Three kernels and two
meetings there and back: the bytes of two all-to-alls over links, and one pass over a rank's own in the place of five.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.ops.rows.row_moves import ALIGNED, Move, loadable
from runtime.ops.rows.token_order import Run, TokenOrder

__all__ = ["InPlace"]

_APART = 256


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
        found = cls(order, batch=q.shape[0], size=q.shape[-1], value=v.shape[-1], item=item, **shares)
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

    def there(self, own: int) -> Iterator[Move]:
        """Of the rank `own`."""
        before, all_past = sum(self.past[:own]), sum(self.past)
        for rank in range(self.order.parts):
            shapes, starts = self.shapes(rank), self.starts(rank)
            first = self.query[rank][0]
            for source in range(3):
                width, keys, past = shapes[source][-1] * self.item, shapes[source][2], (source > 0) * self.past[own]
                cut, moved = _moved(self.order.runs[own], by=all_past if source else 0)
                batch = math.prod(shapes[source][1:]) * self.item
                for place in range(shapes[source][1]):
                    head = self.kv[rank][place] if source else first + place
                    to = (source, head, rank, starts[source] + place * keys * width, batch, width)
                    yield Move(*to, self.order.counts[own], cut, (past, past), moved, width)
                    if past:
                        yield Move(*to, past, past, (0, 0), (before, before), width)

    def back(self, own: int, area: int) -> Iterator[Move]:
        """Of the rank `own`, whose own part goes to its result; `area`: where what comes back begins."""
        width, (first, last) = self.value * self.item, self.query[own]
        for rank in range(self.order.parts):
            is_own, (low, high) = rank == own, self.query[rank]
            heads = self.heads if is_own else self.returned(rank)[2]
            cut, moved = _moved(self.order.runs[rank])
            for head in range(first, last):
                place = head if is_own or head < low else head - (high - low)
                at = place * width + (0 if is_own else area)
                row, rows = heads * width, self.order.counts[rank]
                yield Move(0, head - first, rank, at, rows * row, row, rows, cut, moved, (0, 0), width)

    # -- the exchange --------------------------------------------------------------------------------------------------

    def run(
        self,
        rows: Any,
        own: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """`attend(q, k, v)` with this rank's heads over all tokens, [B, H_i, S, Dv]; back come its own tokens."""
        area: int = rows.second
        table = rows.table((self, "there"), lambda: [*self.there(own)])
        rows.write(table, [loadable(x) for x in (q, k, v)], max(self.order.counts[own], self.past[own]))
        rows.meet()
        whole = [
            _view(rows.memory, start, shape, q.dtype)
            for start, shape in zip(self.starts(own), self.shapes(own), strict=False)
        ]
        out = loadable(attend(*whole).to(q.dtype))
        result = q.new_empty(self.batch, self.order.counts[own], self.heads, self.value)
        table = rows.table((self, area), lambda: [*self.back(own, area)])
        rows.write(table, [out], max(self.order.counts), own=result)
        rows.meet()
        came = _view(rows.memory, area, self.returned(own), q.dtype)
        first, last = self.query[own]
        if first:
            result[:, :, :first] = came[:, :, :first]
        if last < self.heads:
            result[:, :, last:] = came[:, :, first:]
        return result.transpose(1, 2)


def _view(memory: Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)


def _moved(runs: Sequence[Run], *, by: int = 0) -> tuple[int, tuple[int, int]]:
    """Of what stands in the one or two `runs`: the first row of the second, and what makes a row a position."""
    if not runs:
        return 0, (by, by)
    cut = runs[0][1] - runs[0][0]
    second = runs[1][0] - cut if len(runs) > 1 else runs[0][0]
    return cut, (runs[0][0] + by, second + by)


def _up(num_bytes: int) -> int:
    return -(-num_bytes // _APART) * _APART
