"""Which keys a run of queries sees, as ranges of positions: what `attention.allowed` says, before anything runs.

Each query sees keys that follow each other, and later queries see no earlier ones: so the keys that a run of queries
sees are one range, and those that all of them see are another within it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from runtime.ops.rows.token_order import Run

__all__ = ["Visible", "common"]


@dataclass(frozen=True)
class Visible:
    """The limits of an attention, as `attention` has them."""

    causal: bool
    window: int | None = None
    chunk: int | None = None

    @property
    def is_limited(self) -> bool:
        """Whether a query may not see all that came before."""
        return self.window is not None or self.chunk is not None

    def of(self, position: int) -> Run:
        """What the query at `position` sees."""
        low, high = 0, position + 1 if self.causal else sys.maxsize
        if self.window is not None:
            low = max(low, position - self.window + 1)
            high = min(high, position + self.window)
        if self.chunk is not None:
            start = position // self.chunk * self.chunk
            low, high = max(low, start), min(high, start + self.chunk)
        return low, high

    def any_of(self, queries: Run) -> Run:
        """What at least one of them sees."""
        return self.of(queries[0])[0], self.of(queries[1] - 1)[1]

    def all_of(self, queries: Run) -> Run:
        """What each of them sees; the end may stand before the start: nothing."""
        return self.of(queries[1] - 1)[0], self.of(queries[0])[1]


def common(one: Run, other: Run) -> Run | None:
    """What stands in both; None: nothing does."""
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None
