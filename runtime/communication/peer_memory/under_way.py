"""The stream of what is under way by peer memory while the rank computes."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["UnderWay"]


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

    @property
    def is_here(self) -> bool:
        """Whether the current stream is that one."""
        return bool(torch.cuda.current_stream(self._device) == self._stream)

    def finish(self, end: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(end)
        if self._last is end:
            self._last = None

    def wait(self) -> None:
        """Before each kernel on another stream."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)
