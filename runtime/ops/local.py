"""Ops that act differently on each rank through their integer arguments, without communication.

shard      x, ranges in its own positions along one dim  ->  those positions, in order
reorder    x, a permutation of one dim                   ->  x[order]
once       y, the same on every rank                     ->  y on one rank, zeros on the others: y as a partial sum
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["once", "reorder", "shard"]


def shard(x: Tensor, ranges: list[int], *, dim: int, period: int | None = None) -> Tensor:
    """The part of `x` that this rank works on: `ranges` is start, stop, start, stop, ... along `dim`.

    With a `period`, `dim` is a multiple of it (batch * heads), and the ranges are taken from each period.
    """
    if period is not None:
        return shard(torch.unflatten(x, dim, (-1, period)), ranges, dim=dim + 1).flatten(dim, dim + 1)
    if len(ranges) == 2:
        return x.narrow(dim, ranges[0], ranges[1] - ranges[0])
    pieces = [x.narrow(dim, a, b - a) for a, b in zip(ranges[::2], ranges[1::2], strict=True)]
    return torch.cat(pieces, dim) if pieces else x.narrow(dim, 0, 0)


def reorder(x: Tensor, order: list[int], *, dim: int) -> Tensor:
    """`x` with position i along `dim` taken from `order[i]`."""
    return x.index_select(dim, torch.tensor(order, device=x.device))


def once(y: Tensor, first: int) -> Tensor:
    """`y` where `first` is 1, zeros where it is 0: added to a partial sum, y counts once."""
    return y if first else torch.zeros_like(y)
