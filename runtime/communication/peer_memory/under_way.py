"""All-reduces by peer memory that are under way on a stream of their own while the rank computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.communication.channels import Handle

if TYPE_CHECKING:
    from runtime.communication.peer_memory.peer_memory import PeerMemory

__all__ = ["UnderWay", "begin_all_reduce"]

BESIDE = 32
"""Blocks of an all-reduce that others compute beside: those keep the other processors."""


class UnderWay:
    """The stream, and the end of what was begun last: the kernels of one rank run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._last: torch.cuda.Event | None = None

    def begin(self, run: Callable[[], object]) -> torch.cuda.Event:
        """`run` behind all that the current stream has; its end."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()
            self._last = self._stream.record_event()
        return self._last

    def finish(self, end: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(end)
        if self._last is end:
            self._last = None

    def wait(self) -> None:
        """Before each kernel on another stream."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)


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
