"""The tokens of one run, as the host knows them before it starts."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Batch", "PagedRows"]


@dataclass(frozen=True)
class PagedRows:
    """Which rows of a cache in blocks a run is about: their numbers, and the blocks of each."""

    numbers: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Batch:
    """What is known about one run before it starts: the first position and the number of tokens of each row.

    positions  [B, S] on the device; rows with fewer than S tokens repeat their last one
    """

    positions: Tensor
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    active: tuple[bool, ...] = ()
    """Rows that take tokens in this run; the others repeat what they have. Empty: all do."""

    @functools.cached_property
    def end(self) -> int:
        """One more than the largest position."""
        return max(start + count for start, count in zip(self.starts, self.counts, strict=True))

    @functools.cached_property
    def start(self) -> int | None:
        """The position at which every row starts, if that is the same one, all are active and none is filled up."""
        size = self.positions.shape[1]
        alike = len(set(self.starts)) == 1 and all(count == size for count in self.counts) and all(self.active)
        return self.starts[0] if alike else None
