"""Collectives by peer memory that are under way on a stream of their own while the rank computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.peer_memory.peer_memory import PeerMemory

__all__ = ["begin_all_reduce", "exchange_at_once", "exchange_beside", "run_beside"]


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


def exchange_beside(peers: PeerMemory, x: Tensor, out: Tensor, send_counts: Tensor, receive_counts: Tensor) -> Handle:
    """An all_to_all into `out`, of counts that the device reads."""
    run = lambda: peers.all_to_all(x, out, send_counts, receive_counts)  # noqa: E731
    return run_beside(peers, run, out, x, send_counts, receive_counts)


def exchange_at_once(peers: PeerMemory, x: Tensor, out: Tensor, send_counts: Tensor, receive_counts: Tensor) -> Handle:
    """The same, through when it returns."""
    return Handle.done(peers.all_to_all(x, out, send_counts, receive_counts))


def run_beside(peers: PeerMemory, run: Callable[[], object], out: Tensor, *read: Tensor) -> Handle:
    """`run`, which fills `out`; `read`: kept until nobody reads them any more."""
    end, kept = peers.under_way.begin(run), list(read)

    def finish() -> Tensor:
        peers.under_way.finish(end)
        kept.clear()
        return out

    return Handle(finish)
