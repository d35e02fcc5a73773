"""Whether blocks fill a shape, each element once: what no block fills would be whatever the memory held before.

Blocks that lie within a shape and have its volume together fill it if no two of them meet. That takes a time that is
bounded by the square of their number, whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from runtime.program.shards import Block, Piece

__all__ = ["MOST_BLOCKS", "fills", "is_filled"]

MOST_BLOCKS = 8192
"""More are not looked at. A weight of a model has as many as it was stacked from: its experts, or its heads."""


def fills(pieces: Sequence[Piece], shape: Sequence[int], held: str | None) -> bool:
    """Whether pieces, not too many, fill a shape; of codes in pairs, the last may be missing."""
    if len(pieces) > MOST_BLOCKS:
        return False
    blocks = [piece.destination for piece in pieces]
    return is_filled(shape, blocks) or (held == "codes" and is_filled((*shape[:-1], shape[-1] - 1), blocks))


def is_filled(shape: Sequence[int], blocks: Sequence[Block]) -> bool:
    """`blocks` lie within `shape`: per dim, where they start and stop."""
    if not shape:
        return len(blocks) == 1
    if 0 in shape:
        return True
    volumes = [math.prod(stop - start for start, stop in block) for block in blocks]
    solid = [block for block, volume in zip(blocks, volumes, strict=True) if volume]
    return sum(volumes) == math.prod(shape) and len(solid) <= MOST_BLOCKS and _are_apart(solid)


def _are_apart(blocks: Sequence[Block]) -> bool:
    """None of them is empty."""
    # in the dim in which most start at a place of their own, few have to be compared
    dim = max(range(len(blocks[0])), key=lambda dim: len({block[dim] for block in blocks}))
    ends = torch.tensor(sorted(blocks, key=lambda block: block[dim]), dtype=torch.int64)  # [block, dim, 2]
    starts, stops = ends[..., 0], ends[..., 1]
    first = starts[:, dim].contiguous()
    for index in range(len(blocks) - 1):
        beyond = int(torch.searchsorted(first, stops[index, dim]))
        later = slice(index + 1, beyond)
        meets = (starts[later] < stops[index]) & (starts[index] < stops[later])
        if bool(meets.all(dim=1).any()):
            return False
    return True
