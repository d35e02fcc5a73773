"""Attention of a row's latest tokens to all of its tokens, by torch's flash kernel: no mask is ever written down.

    q     [B, H, S, D]     the last S of each row
    k, v  [B, G, T, D]     all T of them, the same for every row
    result [B, H, S, D], and the log-sum-exp of the scores [B, H, S] where asked for

Causal from the bottom right: query i sees the keys up to T - S + i (arXiv:2307.08691, section 3). H / G query heads
share a kv head without copies.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["can_flash", "flash_attention", "flash_rows"]

_HALVES = (torch.float16, torch.bfloat16)
_WIDEST = 256


def can_flash(q: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these: halves, on a GPU that has it, heads of one width."""
    width = q.shape[-1]
    fits = width == v.shape[-1] and width % 8 == 0 and width <= _WIDEST and q.shape[1] % max(1, v.shape[1]) == 0
    return q.device.type == "cuda" and q.dtype in _HALVES and v.dtype == q.dtype and fits and _has_kernel(q.device)


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, return_lse: bool = False
) -> Any:
    """See the module's docstring; `window` n: the latest n keys only, as in `attention.allowed`."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, q.shape[2], k.shape[2], 0.0, True, False,
        scale=scale, window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )  # fmt: skip
    return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)


def flash_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: tuple[int, ...],
    counts: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The same for rows of different lengths: row r has `counts[r]` tokens behind `starts[r]` others in `keys`.

    A row with fewer than S tokens repeats its last one, and so does its result.
    """
    size = q.shape[2]
    if len(set(starts)) == 1 and all(count == size for count in counts):
        end = starts[0] + size
        return flash_attention(q, keys[:, :, :end], values[:, :, :end], scale=scale, window=window)  # type: ignore[no-any-return]
    out = torch.empty((*q.shape[:3], values.shape[-1]), dtype=q.dtype, device=q.device)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        one, end = slice(row, row + 1), start + count
        found = flash_attention(q[one, :, :count], keys[one, :, :end], values[one, :, :end], scale=scale, window=window)
        out[one, :, :count] = found
        out[one, :, count:] = found[:, :, -1:]
    return out
