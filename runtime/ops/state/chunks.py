"""A sequence in chunks of equal length, the last one filled up, and what decays from one of its tokens to another.

    x [B, S, H, ..]  ->  in_chunks(x) [B, H, C, L, ..]      zeros behind the last token
    decay [B, H, C, L]: the logarithm of what is left of a state after each token (at most 0)

    since_start[i] = decay[0] + .. + decay[i]     pairwise[i, j] = exp(decay[j + 1] + .. + decay[i]) for j <= i, else 0

    decayed_products(rows [*, .., L, K], columns [.., L, K], since_start [.., L, 1 or K]) -> [*, .., L, L]
        [i, j] = sum over k of rows[i, k] columns[j, k] exp(since_start[i, k] - since_start[j, k]) for j <= i, else 0

Where each of K numbers decays at its own rate, no matrix of decays stands beside a product of matrices. The way from
token j to i is cut at the start of i's block, so that both parts decay, and neither overflows; within a block it is
multiplied out, column by column. Source: arXiv:2312.06635, section 4.3 (secondary chunks).

A token of zeros that decays nothing leaves a state as it is, so that filling up changes no result.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LENGTH", "decayed_products", "in_chunks", "in_order", "pairwise", "precision"]

LENGTH = 64
"""Tokens of a chunk: enough for a matrix product, few for what grows with their square."""

BLOCK = 16
"""Tokens of a chunk within which decays of single numbers are multiplied out."""


def precision(x: Tensor) -> torch.dtype:
    """A state adds up over all tokens: at least in float32."""
    return torch.promote_types(x.dtype, torch.float32)


def in_chunks(x: Tensor, dtype: torch.dtype) -> Tensor:
    batch, size = x.shape[:2]
    length = min(LENGTH, size)
    count = -(-size // length)
    x = x.to(dtype)
    if missing := count * length - size:
        x = torch.cat([x, x.new_zeros(batch, missing, *x.shape[2:])], dim=1)
    return x.reshape(batch, count, length, *x.shape[2:]).movedim(3, 1)


def in_order(x: Tensor, size: int) -> Tensor:
    """[B, H, C, L, D] -> [B, S, H, D], without what was filled up."""
    return x.flatten(2, 3)[:, :, :size].transpose(1, 2)


def pairwise(since_start: Tensor) -> Tensor:
    """[B, H, C, L] -> [B, H, C, L, L]."""
    length = since_start.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=since_start.device).triu(1)
    # what would grow is hidden before exp, which it would overflow
    return (since_start[..., :, None] - since_start[..., None, :]).masked_fill(later, -torch.inf).exp()


def decayed_products(rows: Tensor, columns: Tensor, since_start: Tensor) -> Tensor:
    """See the module's docstring."""
    if since_start.shape[-1] == 1:
        return (rows @ columns.transpose(-1, -2)) * pairwise(since_start[..., 0])
    length = rows.shape[-2]
    found = rows.new_zeros(*rows.shape[:-1], length)
    for start in range(0, length, BLOCK):
        block = slice(start, min(start + BLOCK, length))
        if start:
            before = since_start[..., start - 1 : start, :]
            of_rows = rows[..., block, :] * (since_start[..., block, :] - before).exp()
            of_columns = columns[..., :start, :] * (before - since_start[..., :start, :]).exp()
            found[..., block, :start] = of_rows @ of_columns.transpose(-1, -2)
        for j in range(start, block.stop):
            own = slice(j, block.stop)
            left = (since_start[..., own, :] - since_start[..., j : j + 1, :]).exp() * columns[..., j : j + 1, :]
            found[..., own, j] = (rows[..., own, :] * left).sum(-1)
    return found
