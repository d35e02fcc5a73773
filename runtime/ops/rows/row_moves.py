"""Which rows of which heads of some tensors belong where in the memory of which rank.

Whoever writes them reads 16 bytes at a time (`runtime.communication.peer_memory.rows.push_rows_kernel`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALIGNED", "Move", "loadable"]

ALIGNED = 16
"""Bytes: rows are loaded and stored in such units."""


@dataclass(frozen=True)
class Move:
    """Rows of one head of a source, and where they go; bytes but for `rows`, `cut` and the shifts, which are rows.

    Row r of it is read at r + read[0] and written at r + written[0]; from `cut` on, at those of the second.
    """

    source: int
    head: int
    rank: int
    """A coordinate; where it is this rank's own, `own` of `write` may stand in the place of the memory."""
    start: int
    batch: int
    row: int
    rows: int
    cut: int
    read: tuple[int, int]
    written: tuple[int, int]
    width: int

    def fields(self) -> list[int]:
        where = [self.source, self.head, self.rank, self.start, self.batch, self.row, self.rows, self.cut]
        return [*where, *self.read, *self.written, self.width // 4]


def loadable(x: Tensor) -> Tensor:
    """[B, H, S, D] as `write` takes it: rows of one stretch that begin where wide loads may."""
    item = x.element_size()
    strides_fit = x.stride(-1) == 1 and all(stride * item % ALIGNED == 0 for stride in x.stride()[:-1])
    if strides_fit and x.data_ptr() % ALIGNED == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
