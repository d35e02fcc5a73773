"""Waiting for others from Python: what the C++ does in short stretches, until it is done or cannot be.

    waiter.wait(status, again, late)   `again(ns)` goes on waiting; `late()` says for whom

Between two stretches it looks for ranks whose process has ended, and at the deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from runtime.communication.shared_memory.segment import Segment

__all__ = ["BROKEN", "DISAGREE", "DONE", "FULL", "LEFT", "WAITING", "WAIT_NS", "Disconnected", "Waiter"]

DONE, WAITING, LEFT, DISAGREE, BROKEN, FULL = range(6)

WAIT_NS = 50_000_000
"""How long the C++ waits before it asks here; so soon, too, is an ended process noticed."""


class Disconnected(RuntimeError):
    """An operation cannot be finished: another rank left, ended, or did not come before the deadline."""


class Waiter:
    """Of one rank of a group, whose ranks each hold their coordinate in `segment`."""

    def __init__(self, segment: Segment, ranks: Sequence[int], timeout_s: float) -> None:
        self._segment, self._ranks, self._timeout_s = segment, ranks, timeout_s

    def wait(self, status: int, again: Callable[[int], int], late: Callable[[], list[int]]) -> int:
        """DONE, DISAGREE or FULL; all else raises Disconnected. late: the coordinates that are awaited."""
        deadline = time.monotonic() + self._timeout_s
        while status == WAITING:
            gone = [c for c in late() if not self._segment.is_held(c)]
            expired = time.monotonic() > deadline
            status = again(0 if gone or expired else WAIT_NS)
            if status == WAITING:
                still = late()
                # it may have finished its part of the operation, and then ended
                if gone := [c for c in gone if c in still]:
                    raise self.ended(gone)
                if expired:
                    raise Disconnected(
                        f"shared memory: timed out after {self._timeout_s:g} s, {self._named(still)} late"
                    )
        if status == LEFT:
            raise Disconnected("shared memory: connection closed by a rank that left")
        if status == BROKEN:
            raise Disconnected("shared memory: connection closed or broken before this operation")
        return status

    def require_alive(self, coordinate: int) -> None:
        if not self._segment.is_held(coordinate):
            raise self.ended([coordinate])

    def ended(self, coordinates: Sequence[int]) -> Disconnected:
        return Disconnected(f"shared memory: connection lost, {self._named(coordinates)} ended")

    def _named(self, coordinates: Sequence[int]) -> str:
        return f"rank {', '.join(str(self._ranks[c]) for c in coordinates)}"
