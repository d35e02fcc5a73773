"""Where a rank's device queues its work: what it computes, what comes and what goes, each in order, beside the others.

    with lanes.incoming():      or `receiving`, `outgoing`: what is queued here waits for nothing else, unless told
        lanes.wait(mark)        until what was queued in another lane before `mark`
        ...
        mark = lanes.mark()

On CUDA lanes are streams: what is computed has the current one, those of transfers come first where both could run.
Elsewhere there is one lane, the host's, and marks say nothing.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

__all__ = ["Lanes", "Mark"]

Mark = torch.cuda.Event | None


class Lanes:
    """See the module's docstring."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[str, torch.cuda.Stream] = {}
        if device.type == "cuda":
            for name in ("receiving", "incoming", "outgoing"):
                self._streams[name] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def receiving(self) -> AbstractContextManager[object]:
        return self._lane("receiving")

    def incoming(self) -> AbstractContextManager[object]:
        return self._lane("incoming")

    def outgoing(self) -> AbstractContextManager[object]:
        return self._lane("outgoing")

    def _lane(self, name: str) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._streams[name]) if self._streams else contextlib.nullcontext()

    def mark(self) -> Mark:
        """What has been queued in the lane that is current."""
        if not self._streams:
            return None
        mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def wait(self, mark: Mark) -> None:
        """What is queued in the current lane from now on comes after what `mark` marks."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def to_host(self, x: Tensor) -> Tensor:
        """A copy, which the host may read once it has waited for a mark behind it."""
        if not self._streams:
            return x.clone()
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return copy.copy_(x, non_blocking=True)
