"""Collectives by peer memory that are under way on a stream of their own while the rank computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.communication.peer_memory.rows.copy_rows import PeerCopies

__all__ = ["begin_all_reduce", "copies_of", "run_beside"]

LEAST_BYTES = 1 << 22
"""Of what copy engines bring: shorter ones take less on the rank's own stream than what two streams take to meet."""


def begin_all_reduce(
    peers: PeerMemory, *, otherwise: Callable[[Tensor], Handle], overwrite: bool
) -> Callable[[Tensor], Handle]:
    """`otherwise`: the same by NCCL."""

    def begin(x: Tensor) -> Handle:
        way = peers.way("all_reduce", x)
        if way == "nccl":
            return otherwise(x)
        out = x if overwrite and x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        return run_beside(peers, lambda: peers.all_reduce(x, out, way), out, x)

    return begin


def copies_of(peers: PeerMemory | None, x: Tensor, *, scatters: bool) -> PeerCopies | None:
    """What copies the pieces of x, or the piece that it is; None where another way takes less."""
    copies = None if peers is None else peers.copies
    if copies is None:
        return None
    whole = x.nbytes if scatters else x.nbytes * copies.num_ranks
    if whole < LEAST_BYTES * copies.num_ranks or not copies.has_room(whole, scatters=scatters):
        return None
    return copies


def run_beside(peers: PeerMemory, run: Callable[[], object], out: Tensor, *read: Tensor) -> Handle:
    """`run`, which fills `out`; `read`: kept until nobody reads them any more."""
    end, kept = peers.under_way.begin(run), list(read)

    def finish() -> Tensor:
        peers.under_way.finish(end)
        kept.clear()
        return out

    return Handle(finish)
