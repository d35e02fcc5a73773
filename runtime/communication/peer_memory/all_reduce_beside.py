"""All-reduces by peer memory that are under way on a stream of their own while the rank computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.peer_memory.peer_memory import PeerMemory

__all__ = ["begin_all_reduce"]

BESIDE = 32
"""Blocks of an all-reduce that others compute beside: those keep the other processors."""


def begin_all_reduce(
    peers: PeerMemory, *, otherwise: Callable[[Tensor], Handle], overwrite: bool
) -> Callable[[Tensor], Handle]:
    """`otherwise`: the same by NCCL."""

    def begin(x: Tensor) -> Handle:
        way = peers.way("all_reduce", x)
        if way == "nccl":
            return otherwise(x)
        out = x if overwrite and x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
        end = peers.under_way.begin(lambda: peers.all_reduce(x, out, way, blocks=BESIDE))
        kept: list[Tensor] = [x]  # until nobody reads it any more

        def finish() -> Tensor:
            peers.under_way.finish(end)
            kept.clear()
            return out

        return Handle(finish)

    return begin
