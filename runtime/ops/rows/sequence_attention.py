"""Attention whose tokens ranks share out: each has the queries, keys and values of its own, and gets their result.

    q       [B, H, S_i, D]     total   S, the tokens of all ranks
    k       [B, G, S_i, D]     mask    additive, broadcastable to [B, H, S_i, S]: keys in order of position
    v       [B, G, S_i, Dv]            of own queries; by ulysses of all, [B, H, S, S]
    result  [B, H, S_i, Dv]    sinks   as in `attention`, and so are the options

    how        what travels                                   bytes that leave a rank, with S_i = S / n
    ring       keys and values, a block at a time             (n - 1) S_i G (D + Dv), fewer with a window or a chunk
    gather     keys and values, all at once                   the same
    ulysses    some heads of all tokens, and back             (n - 1) / n S_i (H (D + Dv) + G' (D + Dv))
    ring-ulysses   ulysses among `neighbours` ranks, and a ring of those that have the same heads

Which tokens are a rank's own is said by `order` (see `token_order`); `parts`: how many ranks share them out. Sizes may
be uneven, and a rank may have no token. G' counts a kv head once for each rank that has query heads which read it,
divided by n.

The same over a cache, `cached_sequence_attention`, has the run's tokens put into the cache of the rank that has them.
`merge` is for runs of one token or a few, which every rank has: each attends with all of them to its part of the cache,
and the parts come together in one all-gather, [B, H, S, Dv + 1] of each rank, so that all have the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from partitioner.errors import CommunicationError, InputError
from runtime.ops.attention import attention
from runtime.ops.collectives import unbound
from runtime.ops.rows.attend_runs import RankQueries
from runtime.ops.rows.exchange_keys import gathered, in_ring
from runtime.ops.rows.ring_of_heads import ring_of_heads
from runtime.ops.rows.token_order import TokenOrder
from runtime.ops.rows.ulysses import by_heads
from runtime.ops.rows.visible import Visible

__all__ = [
    "How",
    "attend_over_ranks",
    "cached_sequence_attention",
    "require_parts",
    "sequence_attention",
    "without_cache",
]

How = Literal["ring", "gather", "ulysses", "ring-ulysses", "merge"]


def sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    total: int,
    mask: Tensor | None,
    sinks: Tensor | None,
    axis: str | tuple[str, ...],
    *,
    how: str,
    parts: int,
    scale: float,
    neighbours: int = 1,
    order: str = "zigzag",
    causal: bool = False,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    kv_map: Sequence[int] | None = None,
) -> Tensor:
    """See the module's docstring."""
    unbound("sequence_attention", axis)


def cached_sequence_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    axis: str | tuple[str, ...],
    *,
    how: str,
    parts: int,
    state: str,
    scale: float,
    neighbours: int = 1,
    order: str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    kv_map: Sequence[int] | None = None,
) -> Tensor:
    """See the module's docstring; `positions` [B, S_i] are those of the queries, `state` as in `cached_attention`."""
    raise _without_cache(state)


def without_cache(channel: Any, *operands: Any, state: str, **options: Any) -> Tensor:
    """What `cached_sequence_attention` is over a channel alone."""
    raise _without_cache(state)


def _without_cache(state: str) -> InputError:
    return InputError(
        f"cached_sequence_attention of {state!r} is not bound to a cache: run the rank through Engine.generate or "
        "parts.generate(...)"
    )


def require_parts(channel: Any, parts: int) -> None:
    """Raise where the group is not as large as the graph says."""
    if parts != len(channel.ranks):
        raise CommunicationError(
            f"rank {channel.rank}: node {channel.node!r} shares out its tokens between {parts} ranks; over "
            f"{channel.axes} there are {len(channel.ranks)}"
        )


def attend_over_ranks(
    channel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    total: int,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    how: str,
    parts: int,
    scale: float,
    neighbours: int = 1,
    order: str = "zigzag",
    causal: bool = False,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    kv_map: Sequence[int] | None = None,
) -> Tensor:
    """`sequence_attention` over a channel."""
    require_parts(channel, parts)
    tokens = TokenOrder.of(int(total), parts, order)
    own = tokens.counts[channel.coordinate]
    if q.shape[2] != own or k.shape[2] != own:
        raise CommunicationError(
            f"rank {channel.rank}: node {channel.node!r} shares out {tokens.total} tokens in {order} order, so this "
            f"rank must bring {own}; its queries are {list(q.shape)}, its keys {list(k.shape)}"
        )
    if how == "ulysses":

        def attend(
            q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, kv_map: list[int] | None
        ) -> Tensor:
            options: dict[str, Any] = {"causal": causal, "window": window, "chunk": chunk, "softcap": softcap}
            return attention(q, k, v, mask, sinks, scale=scale, kv_map=kv_map, **options)

        return by_heads(channel, q, k, v, attend, queries=tokens, mask=mask, sinks=sinks, kv_map=kv_map)
    visible = Visible(causal, window, chunk)
    if how == "ring-ulysses":
        if mask is not None:
            raise CommunicationError(
                f"node {channel.node!r} has a mask, which ring-ulysses does not take: ring, gather and ulysses do"
            )
        queries_of = functools.partial(RankQueries, visible=visible, scale=scale, softcap=softcap)
        return ring_of_heads(
            channel, q, k, v, tokens, visible, sinks, neighbours=neighbours, kv_map=kv_map, queries_of=queries_of
        )
    runs, width = tokens.runs[channel.coordinate], v.shape[-1]
    queries = RankQueries(q, runs, visible, width=width, scale=scale, softcap=softcap, mask=mask)
    if how == "ring":
        blocks = in_ring(channel, k, v, tokens, visible)
    elif how == "gather":
        blocks = gathered(channel, k, v, tokens)
    else:
        raise CommunicationError(
            f"node {channel.node!r}: tokens meet by ring, gather, ulysses or ring-ulysses, not by {how!r}"
        )
    for block in blocks:
        queries.add(block.mapped(kv_map))
    return queries.result(sinks)
