"""A quantised tensor as its files hold it: codes of a few bits, and a grid of scales over them.

    value[.., n, k] = (code[.., n, k] - zero[.., n // rows, k // cols]) * scale[.., n // rows, k // cols]

    Packed("mlp.up_proj.weight", "fp8", (512, 256), {"codes": ..., "scales": ...}, block=(128, 128))

Its shape is that of the numbers, outputs before inputs: [.., N, K]. A stored tensor may hold it in another order,
several codes in a word; `runtime.weights.quantized.formats` knows. The last block of a dim may be cut off by the
tensor's end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.program.shards import Block, at, extents

__all__ = ["Packed", "Raw"]

Raw = Callable[[str, Block], Tensor]
"""(role of a part, block) -> that block of the stored tensor, as it is stored."""


@dataclass(frozen=True)
class Packed:
    """See the module's docstring.

    format: a row of `FORMATS`. parts: the names of stored tensors by their role. block: rows and columns of one scale.
    computed_in: the dtype of the product, which is then rounded to the weight's. groups: that of each column, where
    it is another than its place tells (activation order). rows: where the scales are a table for all of the tensor,
    the row of that for each row of the tensor, [.., N]; `groups` is then a column of the table.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    block: tuple[int, int]
    computed_in: torch.dtype = torch.float32
    groups: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)
    rows: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the scales, one for each block."""
        *lead, rows, cols = self.shape
        return (*lead, -(-rows // self.block[0]), -(-cols // self.block[1]))

    def scales_of(self, box: Block) -> Block:
        """The part of the grid that a block of the tensor needs."""
        (*lead, (top, bottom), (left, right)), (high, wide) = box, self.block
        across = (left // wide, -(-right // wide))
        if self.groups is not None and right > left:
            own = self.groups[left:right]
            across = int(own.min()), int(own.max()) + 1
        if self.rows is not None:
            mine = self.rows[at(box[:-1])]
            return ((int(mine.min()), int(mine.max()) + 1) if mine.numel() else (0, 0), across)
        return (*lead, (top // high, -(-bottom // high)), across)

    def spread(self, scales: Tensor, box: Block) -> Tensor:
        """Of the part of the grid for `box`, one number per element of it."""
        (*_, rows, cols), (high, wide) = box, self.block
        if self.rows is not None and self.groups is not None:
            (top, _), (left, _) = self.scales_of(box)
            return scales[(self.rows[at(box[:-1])] - top)[..., None], self.groups[slice(*cols)] - left]
        if self.groups is not None:
            across = self.groups[slice(*cols)] - self.scales_of(box)[-1][0]
        else:
            across = _blocks(cols, wide)
        *_, num_rows, num_cols = extents(box)
        found = scales.expand(*scales.shape[:-1], num_cols) if scales.shape[-1] == 1 else scales[..., across]
        return found if high == 1 or found.shape[-2] == num_rows == 1 else found[..., _blocks(rows, high), :]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def _blocks(ends: tuple[int, int], size: int) -> Tensor:
    """The block of each index, counted from the first one's."""
    start, stop = ends
    return torch.arange(start, stop) // size - start // size
