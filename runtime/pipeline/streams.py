"""The CUDA streams of a rank between its neighbours: one computes, the others receive, copy and send beside it.

    with streams.incoming():        or `receiving`, `outgoing`: what is queued here waits for nothing else, unless told
        streams.wait(event)         until what was queued on another stream before `event`
        ...
        event = streams.record()

What is computed has the current stream; those of transfers come first where both could run. Without CUDA there is one
queue, the host's, and events are None.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["Event", "Streams"]

Event = torch.cuda.Event | None


class Streams:
    """See the module's docstring."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[str, torch.cuda.Stream] = {}
        if device.type == "cuda":
            for name in ("receiving", "incoming", "outgoing"):
                self._streams[name] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def receiving(self) -> AbstractContextManager[object]:
        return self._stream("receiving")

    def incoming(self) -> AbstractContextManager[object]:
        return self._stream("incoming")

    def outgoing(self) -> AbstractContextManager[object]:
        return self._stream("outgoing")

    def _stream(self, name: str) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[name]) if self._streams else contextlib.nullcontext()

    def record(self) -> Event:
        """The event behind all that has been queued on the current stream."""
        if not self._streams:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: Event) -> None:
        """What is queued on the current stream from now on comes after `event`."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def to_host(self, x: Tensor) -> Tensor:
        """A copy, which the host may read once it has waited for an event behind it."""
        if not self._streams:
            return x.clone()
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return copy.copy_(x, non_blocking=True)
