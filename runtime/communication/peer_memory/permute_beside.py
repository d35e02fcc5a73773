"""Permutes by peer memory that are under way on a stream of their own while the rank computes.

A ring attends to the block that it has while the next one comes: the permute takes few processors, and few are enough
for the link. Short ones stay on the rank's own stream, which takes less than what two streams take to meet.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.peer_memory.peer_memory import PeerMemory

__all__ = ["begin_permute"]

IS_ON = False
"""Whether rings go so. The kernel and the stream are those of all-reduces that are under way; together with permutes
they have not run on GPUs, so only `benchmarks.gpu.sequences --unproven` and tests turn it on."""
BESIDE = 24
"""Blocks of a permute that others compute beside."""
LEAST_BYTES = 1 << 22


def begin_permute(
    peers: PeerMemory, *, otherwise: Callable[[Tensor], Handle], shift: int
) -> Callable[[Tensor], Handle]:
    """`otherwise`: the same by whatever is quickest on the rank's own stream, or by NCCL on NCCL's."""
    shift %= peers.group.size

    def begin(x: Tensor) -> Handle:
        if shift == 0 or x.nbytes < LEAST_BYTES or not peers.takes(x):
            return otherwise(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        end = peers.under_way.begin(lambda: peers.permute(x, out, "large", shift=shift, blocks=BESIDE))
        kept: list[Tensor] = [x]  # until nobody reads it any more

        def finish() -> Tensor:
            peers.under_way.finish(end)
            kept.clear()
            return out

        return Handle(finish)

    return begin
