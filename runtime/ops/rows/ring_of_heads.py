"""A ring over groups of neighbouring ranks, which exchange heads for tokens among themselves: both at once.

    8 ranks, 2 of which exchange heads     0 1 | 2 3 | 4 5 | 6 7      all-to-all in each group
                                           0 2 4 6,  1 3 5 7          a ring of the ranks with the same heads

Neighbours have tokens that follow each other, in either order of tokens, so what a group has is dealt out in that order
too. All-to-alls are the cheaper exchange between a few ranks, a ring is hidden behind work between many (Fang and Zhao,
arXiv:2405.07719, section 4). Both go over the one group that all these ranks are: what is for no rank has no bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

from partitioner.errors import CommunicationError
from runtime.ops.rows.attend_runs import RankQueries
from runtime.ops.rows.exchange_keys import in_ring
from runtime.ops.rows.token_order import Run, TokenOrder
from runtime.ops.rows.ulysses import by_heads, heads_of, kv_of
from runtime.ops.rows.visible import Visible

__all__ = ["ring_of_heads"]


def ring_of_heads(
    channel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: TokenOrder,
    visible: Visible,
    sinks: Tensor | None,
    *,
    neighbours: int,
    kv_map: Sequence[int] | None,
    queries_of: Callable[..., RankQueries],
) -> Tensor:
    """`neighbours`: how many ranks exchange heads; `queries_of(q, runs)`: as they attend."""
    num_ranks, own = len(channel.ranks), channel.coordinate
    if neighbours < 1 or num_ranks % neighbours:
        raise CommunicationError(
            f"rank {channel.rank}: node {channel.node!r} exchanges heads between {neighbours} ranks, which must divide "
            f"the {num_ranks} that share out its tokens"
        )
    first = own // neighbours * neighbours
    within, groups = _within(tokens, first, neighbours), _groups(tokens, neighbours)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, kv_map: list[int] | None
    ) -> Tensor:
        queries = queries_of(q, groups.runs[own // neighbours], width=v.shape[-1])
        for block in in_ring(_Ring(channel, neighbours, most), k, v, groups, visible):
            queries.add(block.mapped(kv_map))
        return queries.result(sinks)

    # rings of fewer heads bring as many as the others: a permute of all ranks takes one shape
    most = max(len(share.kv) for share in heads_of(neighbours, q.shape[1], kv_of(q, k, kv_map)))
    group = _Neighbours(channel, first, neighbours)
    return by_heads(group, q, k, v, attend, queries=within, mask=None, sinks=sinks, kv_map=kv_map)


@functools.lru_cache(maxsize=1024)
def _groups(tokens: TokenOrder, neighbours: int) -> TokenOrder:
    """What each group of neighbours has: runs that follow each other are one."""
    found = []
    for first in range(0, tokens.parts, neighbours):
        joined: list[Run] = []
        for start, stop in sorted(run for runs in tokens.runs[first : first + neighbours] for run in runs):
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        found.append(joined)
    return TokenOrder.from_runs(found)


@functools.lru_cache(maxsize=1024)
def _within(tokens: TokenOrder, first: int, neighbours: int) -> TokenOrder:
    """What each of some neighbours has of their tokens, counted from 0 in order of position."""
    runs = tokens.runs[first : first + neighbours]
    places, at = {}, 0
    for start, stop in sorted(run for mine in runs for run in mine):
        places[start] = (at, at + stop - start)
        at += stop - start
    return TokenOrder.from_runs([[places[start] for start, _ in mine] for mine in runs])


class _Neighbours:
    """Some of the ranks of a channel that follow each other, as a channel of their own for all-to-alls."""

    def __init__(self, channel: Any, first: int, size: int) -> None:
        self._channel, self._first = channel, first
        self.ranks = channel.ranks[first : first + size]
        self.coordinate, self.rank, self.node = channel.coordinate - first, channel.rank, channel.node

    def peer_rows(self) -> None:
        """Memory that all of the channel's ranks have is none of theirs alone."""

    def all_to_all(self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        before, behind = [0] * self._first, [0] * (len(self._channel.ranks) - self._first - len(self.ranks))
        found: Tensor = self._channel.all_to_all(
            x, [*before, *send_counts, *behind], [*before, *receive_counts, *behind]
        )
        return found


class _Ring:
    """Every `step`-th rank of a channel, this one among them, as a channel of their own for permutes."""

    def __init__(self, channel: Any, step: int, heads: int) -> None:
        """`heads`: how many heads the fullest of such rings brings."""
        self._channel, self._step, self._heads = channel, step, heads
        self.ranks = channel.ranks[channel.coordinate % step :: step]
        self.coordinate, self.rank, self.node = channel.coordinate // step, channel.rank, channel.node

    def permute_begin(self, x: Tensor, shift: int) -> _Coming:
        filled = functional.pad(x, (0, 0, 0, 0, 0, self._heads - x.shape[1]))
        return _Coming(self._channel.permute_begin(filled, shift * self._step), x.shape[1])


class _Coming(NamedTuple):
    """What has begun, with the heads that are there."""

    handle: Any
    heads: int

    def finish(self) -> Tensor:
        found: Tensor = self.handle.finish()[:, : self.heads]
        return found
