"""Collectives by peer memory that are under way on a stream of their own while the rank computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.communication.peer_memory.rows.copy_rows import PeerCopies

__all__ = ["begin_all_reduce", "begin_permute", "copies_of", "run_beside"]


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


def copies_of(peers: PeerMemory | None, x: Tensor, *, scatters: bool) -> PeerCopies | None:
    """What copies the pieces of x, or the piece that it is; None where another way takes less."""
    copies = None if peers is None else peers.copies
    if not COPIES_ON or copies is None:
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
