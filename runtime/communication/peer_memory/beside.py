"""Collectives by peer memory that are under way on a stream of their own while the rank computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.communication.peer_memory.rows.copy_rows import PeerCopies

__all__ = [
    "begin_all_gather",
    "begin_all_reduce",
    "begin_permute",
    "begin_reduce_scatter",
    "copies_of",
    "exchange_at_once",
    "exchange_beside",
    "run_beside",
]


PERMUTES_ON = False
"""Whether rings go so. The kernel and the stream are those of all-reduces that are under way; together with permutes
they have not run on GPUs, so only `benchmarks.gpu.sequences --unproven` and tests turn it on."""
LEAST_BYTES = 1 << 22
"""Of a permute: shorter ones take less on the rank's own stream than what two streams take to meet."""
COPIES_ON = False
"""Whether gathers and scatters of as many bytes go by copy engines while the rank computes. Off: on GPUs they have not
run; `benchmarks.gpu.experts --copies` and tests turn it on."""


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


def begin_permute(
    peers: PeerMemory, *, otherwise: Callable[[Tensor], Handle], shift: int
) -> Callable[[Tensor], Handle]:
    """A ring attends to the block that it has while the next one comes: few processors are enough for the link.

    otherwise: the same by whatever is quickest on the rank's own stream, or by NCCL on NCCL's.
    """
    shift %= peers.group.size

    def begin(x: Tensor) -> Handle:
        if shift == 0 or x.nbytes < LEAST_BYTES or not peers.takes(x):
            return otherwise(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        return run_beside(peers, lambda: peers.permute(x, out, "large", shift=shift), out, x)

    return begin


def copies_of(peers: PeerMemory | None, x: Tensor, *, parts: int) -> PeerCopies | None:
    """What copies pieces of x, of which there are so many; None where another way takes less."""
    copies = None if peers is None else peers.copies
    if not COPIES_ON or copies is None or x.nbytes < parts * LEAST_BYTES or not copies.has_room(x.nbytes):
        return None
    return copies


def begin_all_gather(copies: PeerCopies, x: Tensor) -> Handle:
    """Of pieces of one size, put together at their first dim."""
    x = x.contiguous()
    out = x.new_empty((copies.num_ranks * x.shape[0], *x.shape[1:]))
    return run_beside(copies.peers, lambda: copies.gather(x, out), out, x)


def begin_reduce_scatter(copies: PeerCopies, x: Tensor) -> Handle:
    """Of as many rows for each."""
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // copies.num_ranks, *x.shape[1:]))
    return run_beside(copies.peers, lambda: copies.scatter(x, out), out, x)


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

    return Handle(finish, into=out)
