"""Asynchronous collectives by peer memory: they run on a side stream while the rank computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.communication.peer_memory.rows.copy_rows import PeerCopies

__all__ = ["begin_all_reduce", "copies_of", "run_async"]

LEAST_BYTES = 1 << 22
"""Of what copy engines bring: shorter ones take less on the rank's own stream than two streams take to synchronize."""


def begin_all_reduce(
    peers: PeerMemory, *, otherwise: Callable[[Tensor], Handle], overwrite: bool
) -> Callable[[Tensor], Handle]:
    """`otherwise`: the same by NCCL."""

    def begin(x: Tensor) -> Handle:
        way = peers.way("all_reduce", x)
        if way == "nccl":
            return otherwise(x)
        out = x if overwrite and x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        return run_async(peers, lambda: peers.all_reduce(x, out, way), out, x)

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


def run_async(peers: PeerMemory, run: Callable[[], object], out: Tensor, *read: Tensor) -> Handle:
    """Runs what fills `out` on the side stream; `read` is kept alive until the handle is finished."""
    end, kept = peers.side_stream.begin(run), list(read)

    def finish() -> Tensor:
        peers.side_stream.finish(end)
        kept.clear()
        return out

    return Handle(finish)
