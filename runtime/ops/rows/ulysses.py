"""All tokens of some heads in the place of some tokens of all heads, and back.

    q [B, H, S_i, D], k, v [B, G, S_i, ..]   ->   q [B, H_i, S, D], k, v [B, G_i, S, ..]   ->  out [B, H, S_i, Dv]

Two all-to-alls, with an ordinary attention between them (DeepSpeed-Ulysses, Jacobs et al., arXiv:2309.14509). Each rank
gets H / n query heads, some one more than others, or none, and the kv heads that these read: one that several ranks
need goes to all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import CommunicationError
from runtime.ops.rows.token_order import TokenOrder
from runtime.ops.rows.ulysses_in_place import InPlace

__all__ = ["Heads", "by_heads", "heads_of", "kv_of"]


@dataclass(frozen=True)
class Heads:
    """Which heads a rank attends with: `query` of them, half open, and the kv heads `kv` that these read."""

    query: tuple[int, int]
    kv: tuple[int, ...]
    kv_map: tuple[int, ...]
    """For each of the query heads, which of `kv` it reads."""

    @property
    def count(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def uneven_map(self) -> list[int] | None:
        """`kv_map`; None where as many query heads read each kv head, in order."""
        each = self.count // max(1, len(self.kv))
        in_order = self.kv_map == tuple(number for number in range(len(self.kv)) for _ in range(each))
        return None if in_order else list(self.kv_map)

    def of(self, x: Tensor) -> Tensor:
        """Of [B, H, ..] the query heads; of [B, 1, ..], which all heads share, what there is."""
        return x[:, : self.count] if x.shape[1] == 1 else x[:, slice(*self.query)]


@functools.lru_cache(maxsize=256)
def heads_of(num_ranks: int, num_heads: int, kv: tuple[int, ...]) -> tuple[Heads, ...]:
    """`kv`: which kv head each query head reads."""
    found = []
    for rank in range(num_ranks):
        first, last = num_heads * rank // num_ranks, num_heads * (rank + 1) // num_ranks
        read = tuple(sorted(set(kv[first:last])))
        found.append(Heads((first, last), read, tuple(read.index(each) for each in kv[first:last])))
    return tuple(found)


def kv_of(q: Tensor, k: Tensor, kv_map: Sequence[int] | None) -> tuple[int, ...]:
    """Which kv head each query head reads."""
    if kv_map is not None:
        return tuple(kv_map)
    per_kv = q.shape[1] // max(1, k.shape[1])
    return tuple(head // per_kv for head in range(q.shape[1]))


def by_heads(
    channel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, list[int] | None], Tensor],
    *,
    queries: TokenOrder,
    mask: Tensor | None,
    sinks: Tensor | None,
    kv_map: Sequence[int] | None,
    kv_rows: Sequence[int] | None = None,
    past: Sequence[int] | None = None,
) -> Tensor:
    """`attend(q, k, v, mask, sinks, kv_map)` over all tokens with this rank's heads; back come this rank's tokens.

    Queries come in order of position, and so do keys and values; with `kv_rows`, the number of those that each rank
    brings, they come rank by rank. With `past`, the first so many of each rank come rank by rank, before all others.
    mask, sinks: as in `attention`; a mask has all queries, and does not travel.
    """
    num_ranks, own, (batch, heads, size, _) = len(channel.ranks), channel.coordinate, q.shape
    shares = heads_of(num_ranks, heads, kv_of(q, k, kv_map))
    if mask is not None:
        mask = mask.to(q.dtype).reshape(*([1] * (4 - mask.dim())), *mask.shape)
    mine = shares[own]
    before = tuple(past or [0] * num_ranks)
    given_mask, given_sinks = None if mask is None else mine.of(mask), _sinks(sinks, mine)
    if kv_rows is None and (rows := channel.peer_rows()) is not None:
        query, kv = tuple(share.query for share in shares), tuple(share.kv for share in shares)
        in_place = InPlace.of(rows, queries, q, k, v, query=query, kv=kv, past=before)
        if in_place is not None:
            last = given_mask, given_sinks, mine.uneven_map
            return in_place.run(rows, own, q, k, v, lambda q, k, v: attend(q, k, v, *last))
    brought = list(kv_rows) if kv_rows is not None else [a + b for a, b in zip(before, queries.counts, strict=True)]

    def tensors(share: Heads, rank: int) -> list[tuple[int, ...]]:
        """The shapes of what `rank` sends to the rank with these heads."""
        kv = (batch, len(share.kv), brought[rank])
        return [(batch, share.count, queries.counts[rank], q.shape[-1]), (*kv, k.shape[-1]), (*kv, v.shape[-1])]

    send_counts = [sum(map(math.prod, tensors(share, own))) for share in shares]
    sent, at = q.new_empty(sum(send_counts)), 0
    for share in shares:
        for x, wanted in ((q, range(*share.query)), (k, share.kv), (v, share.kv)):
            at = _put(sent, at, _heads(x, wanted))
    coming = [tensors(mine, rank) for rank in range(num_ranks)]
    receive_counts = [sum(map(math.prod, shapes)) for shapes in coming]
    received = channel.all_to_all(sent, send_counts, receive_counts)
    by_rank = [
        [piece.view(shape) for piece, shape in zip(part.split([*map(math.prod, shapes)]), shapes, strict=True)]
        for part, shapes in zip(received.split(receive_counts), coming, strict=True)
    ]
    whole = [torch.cat([*_in_order([parts[0] for parts in by_rank], queries)], dim=2)]
    for each in (1, 2):
        pieces = [parts[each] for parts in by_rank]
        if kv_rows is None:
            kept = [x[:, :, :count] for x, count in zip(pieces, before, strict=True) if count]
            new = [x[:, :, count:] for x, count in zip(pieces, before, strict=True)]
            pieces = [*kept, *_in_order(new, queries)]
        whole.append(torch.cat(pieces, dim=2))
    out = attend(whole[0], whole[1], whole[2], given_mask, given_sinks, mine.uneven_map)

    # tokens come back before heads, as what follows reads them
    width = v.shape[-1]
    send_counts = [mine.count * batch * count * width for count in queries.counts]
    receive_counts = [share.count * batch * size * width for share in shares]
    sent, at = out.new_empty(sum(send_counts)), 0
    for count, runs in zip(queries.counts, queries.runs, strict=True):
        to = sent[at : at + batch * count * mine.count * width].view(batch, count, mine.count, width)
        at, row = at + to.numel(), 0
        for start, stop in runs:
            to[:, row : row + stop - start] = out[:, :, start:stop].transpose(1, 2)
            row += stop - start
    returned = channel.all_to_all(sent, send_counts, receive_counts)
    by_heads_of = zip(returned.split(receive_counts), shares, strict=True)
    return torch.cat([piece.view(batch, size, share.count, width) for piece, share in by_heads_of], dim=2).transpose(
        1, 2
    )


def _heads(x: Tensor, wanted: Sequence[int]) -> Tensor:
    """Some heads of x [B, H, S, D]; without a copy where they follow each other."""
    follow = list(wanted) == list(range(wanted[0], wanted[0] + len(wanted))) if wanted else True
    return x[:, wanted[0] : wanted[0] + len(wanted)] if wanted and follow else x[:, list(wanted)]


def _put(flat: Tensor, at: int, x: Tensor) -> int:
    """Writes x to `flat` from `at` on; where it ends."""
    flat[at : at + x.numel()].view(x.shape).copy_(x)
    return at + x.numel()


def _in_order(pieces: Sequence[Tensor], order: TokenOrder) -> list[Tensor]:
    """The runs of all ranks' tokens, dim 2 of their pieces, in order of position."""
    found = []
    for piece, runs in zip(pieces, order.runs, strict=True):
        row = 0
        for start, stop in runs:
            found.append((start, piece[:, :, row : row + stop - start]))
            row += stop - start
    return [piece for _, piece in sorted(found, key=lambda each: each[0])] or [pieces[0][:, :, :0]]


def _sinks(sinks: Tensor | None, mine: Heads) -> Tensor | None:
    if sinks is None or sinks.dim() == 1:
        return None if sinks is None else sinks[slice(*mine.query)]
    sinks = sinks.reshape(*([1] * (4 - sinks.dim())), *sinks.shape)
    if sinks.shape[2] != 1:
        raise CommunicationError(f"sinks of [heads] or [.., heads, 1, 1] are exchanged; these are {list(sinks.shape)}")
    return mine.of(sinks)
