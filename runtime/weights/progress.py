"""A line on the terminal that says how much of something is done; nothing where standard error is none."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

__all__ = ["Progress"]

_WIDTH = 24
_EVERY_S = 0.1
_GIGA = 1e9


class Progress:
    """Counts bytes, from any thread: `with Progress("loading", total) as shown: shown.advance(n)`."""

    def __init__(self, what: str, total: int, *, show: bool) -> None:
        self.what, self.total, self.done = what, total, 0
        self._show = show and total > 0 and sys.stderr.isatty()
        self._lock = threading.Lock()
        self._began = self._said = time.perf_counter()

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self.done += num_bytes
            now = time.perf_counter()
            if self._show and now - self._said >= _EVERY_S:
                self._said = now
                self._write("\r")

    def _write(self, start: str) -> None:
        filled = int(_WIDTH * self.done / self.total)
        seconds = max(time.perf_counter() - self._began, 1e-9)
        sys.stderr.write(
            f"{start}{self.what} {'#' * filled}{'.' * (_WIDTH - filled)} "
            f"{self.done / _GIGA:.2f} of {self.total / _GIGA:.2f} GB, {self.done / _GIGA / seconds:.2f} GB/s"
        )
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._show:
            self._write("\r")
            sys.stderr.write("\n")
