"""Keys and values of all ranks that share out the tokens, as blocks that come to a rank one after the other.

    ring      rank i has its own first, then those of rank i - 1, i - 2, ..    n - 1 permutes
    gather    those of all ranks at once                                      1 all-gather

The next block of a ring is on its way before the one that is there is handed out. Each rank hands on what came to it
(Liu et al., "Ring Attention", arXiv:2310.01889, section 3), unless a window or a chunk keeps much of it out of sight:
then each sends to each what that one sees, and nothing else. Keys and values go in one message, and once for all the
query heads that share them. A permute takes tensors of one shape: what is filled up is no one's key.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from runtime.ops.rows.attend_runs import Block
from runtime.ops.rows.share_rows import in_order
from runtime.ops.rows.token_order import Run, TokenOrder
from runtime.ops.rows.visible import Visible, common

__all__ = ["around", "filled_up", "gathered", "in_ring"]


def in_ring(channel: Any, k: Tensor, v: Tensor, order: TokenOrder, visible: Visible) -> Iterator[Block]:
    """See the module's docstring; k, v: the rank's own."""
    if visible.is_limited:
        yield from _to_each(channel, k, v, order, visible)
        return
    message, width = filled_up(torch.cat([k, v], -1), max(order.counts)), k.shape[-1]
    for source, rows in around(channel, message):
        yield Block(rows[..., :width], rows[..., width:], order.runs[source])


def around(channel: Any, message: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What each rank brings, its own first; the next one is on its way before one is handed out."""
    num_ranks, own = len(channel.ranks), channel.coordinate
    for step in range(num_ranks - 1):
        coming = channel.permute_begin(message, 1)
        yield (own - step) % num_ranks, message
        message = coming.finish()
    yield (own + 1) % num_ranks, message


def _to_each(channel: Any, k: Tensor, v: Tensor, order: TokenOrder, visible: Visible) -> Iterator[Block]:
    num_ranks, own, width = len(channel.ranks), channel.coordinate, k.shape[-1]
    block = Block(k, v, order.runs[own])
    for step in range(1, num_ranks):
        runs = [_seen_by(order, visible, rank, (rank + step) % num_ranks) for rank in range(num_ranks)]
        wanted = [k.narrow(2, 0, 0), *_rows(k, order.runs[own], runs[own])]
        values = [v.narrow(2, 0, 0), *_rows(v, order.runs[own], runs[own])]
        message = torch.cat([torch.cat(wanted, 2), torch.cat(values, 2)], -1)
        coming = channel.permute_begin(filled_up(message, max(map(_count, runs))), step)
        yield block
        message = coming.finish()
        block = Block(message[..., :width], message[..., width:], runs[(own - step) % num_ranks])
    yield block


def gathered(channel: Any, k: Tensor, v: Tensor, order: TokenOrder) -> Iterator[Block]:
    """The same as one block, in order of position."""
    message = channel.all_gather(torch.cat([k, v], -1), dim=2, sizes=list(order.counts))
    whole = in_order(message, order, 2)
    yield Block(whole[..., : k.shape[-1]], whole[..., k.shape[-1] :], ((0, order.total),) if order.total else ())


@functools.lru_cache(maxsize=4096)
def _seen_by(order: TokenOrder, visible: Visible, source: int, target: int) -> tuple[Run, ...]:
    """What rank `target` sees of the tokens of rank `source`."""
    sights = [visible.any_of(run) for run in order.runs[target]]
    found = []
    for run in order.runs[source]:
        seen = [each for sight in sights if (each := common(run, sight)) is not None]
        if seen:  # whatever lies between two of them goes with them
            found.append((min(start for start, _ in seen), max(stop for _, stop in seen)))
    return tuple(found)


def _rows(x: Tensor, runs: tuple[Run, ...], wanted: tuple[Run, ...]) -> Iterator[Tensor]:
    """Of x [B, G, T, D], whose rows stand at the positions of `runs`, those at the positions `wanted`."""
    at = 0
    for start, stop in runs:
        for each in wanted:
            if start <= each[0] and each[1] <= stop:
                yield x.narrow(2, at + each[0] - start, each[1] - each[0])
        at += stop - start


def _count(runs: tuple[Run, ...]) -> int:
    return sum(stop - start for start, stop in runs)


def filled_up(x: Tensor, size: int) -> Tensor:
    """[B, G, T, D] with as many rows as the longest message has."""
    return x if x.shape[2] == size else functional.pad(x, (0, 0, 0, size - x.shape[2]))
