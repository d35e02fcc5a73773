"""The CUDA stream on which peer memory's collectives run while the rank computes on its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["SideStream"]


class SideStream:
    """The stream, and the end of what was begun on it last: a rank's kernels of peer memory run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._last: torch.cuda.Event | None = None

    def begin(self, run: Callable[[], object]) -> torch.cuda.Event:
        """Queues `run` behind all that the current stream has, and returns the event of its end."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            run()
            self._last = self._stream.record_event()
        return self._last

    @property
    def is_current(self) -> bool:
        return bool(torch.cuda.current_stream(self._device) == self._stream)

    def finish(self, end: torch.cuda.Event) -> None:
        """Makes the current stream wait for `end`."""
        torch.cuda.current_stream(self._device).wait_event(end)
        if self._last is end:
            self._last = None

    def wait(self) -> None:
        """Makes the current stream wait for all that was begun; called before each kernel of peer memory there."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)
