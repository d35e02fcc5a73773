"""On standard error: what a compile is doing, once it takes more than two seconds, and where the time went.

Only where it is a terminal, and a line that vanishes; `verbose` writes the steps and their seconds when all is done,
wherever standard error goes.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from partitioner.program.progress import watched

if TYPE_CHECKING:
    from rich.status import Status

__all__ = ["Shown", "shown"]

AFTER_S = 2.0


class Shown:
    """See `partitioner.program.progress.Listener`. seconds: by the names of a step and those that it lies in."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[tuple[str, ...], float] = {}
        self._open: list[str] = []
        self._status: Status | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    def begin(self, name: str) -> None:
        with self._lock:
            self._open.append(name)
            self.seconds.setdefault(tuple(self._open), 0.0)
            if self._status is not None:
                self._status.update(self._said())
            elif len(self._open) == 1 and self.console.is_terminal:
                self._timer = threading.Timer(AFTER_S, self._start)
                self._timer.daemon = True
                self._timer.start()

    def end(self, name: str, seconds: float) -> None:
        with self._lock:
            self.seconds[tuple(self._open)] += seconds
            self._open.pop()
            if not self._open:
                self.stop()
            elif self._status is not None:
                self._status.update(self._said())

    def stop(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._status is not None:
                self._status.stop()
            self._timer = self._status = None

    def _start(self) -> None:
        from rich.status import Status  # here: most commands show nothing

        with self._lock:
            if self._open and self._status is None:
                self._status = Status(self._said(), console=self.console)
                self._status.start()

    def _said(self) -> str:
        return ": ".join(self._open)

    def lines(self) -> list[str]:
        """Each step with its seconds, those within it below it."""
        return [f"{'  ' * (len(at) - 1)}{at[-1]}: {seconds:.1f} s" for at, seconds in self.seconds.items()]


@contextlib.contextmanager
def shown(*, verbose: bool) -> Iterator[None]:
    console = Console(file=sys.stderr)
    listener = Shown(console)
    try:
        with watched(listener):
            yield
    finally:
        listener.stop()
        if verbose:
            for line in listener.lines():
                console.print(line, markup=False, highlight=False, soft_wrap=True)
