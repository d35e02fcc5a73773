"""Attention of a row's latest tokens to all of its tokens, by torch's kernels: no mask is ever written down.

    q     [B, H, S, D]     the last S of each row
    k, v  [B, G, T, D]     all T of them, the same for every row
    result [B, H, S, D], and the log-sum-exp of the scores [B, H, S] where asked for

Causal from the bottom right: query i sees the keys up to T - S + i (arXiv:2307.08691, section 3). H / G query heads
share a kv head without copies.

On a Hopper GPU cuDNN's kernel is nearly twice as fast as torch's flash kernel, but knows causality from the top left
only: the keys before the row's latest tokens are one part, these tokens another, and a pass over the results merges
them by their log-sum-exp. It is prepared once for every pair of sizes, so it has to pay for that.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from runtime.ops.kernels.merge.merge_part import merge_part
from runtime.ops.kernels.triton_needs import is_replayed, missing_for_triton

__all__ = ["can_flash", "cudnn_part", "flash_attention", "flash_behind", "flash_rows", "pays_cudnn_part"]

_HALVES = (torch.float16, torch.bfloat16)
_WIDEST, _WIDEST_OF_CUDNN = 256, 128


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
    if window is None and _pays_cudnn(q, k):
        out, lse = _cudnn_attention(q, k, v, scale)
        return (out, lse) if return_lse else out
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, q.shape[2], k.shape[2], 0.0, True, False,
        scale=scale, window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )  # fmt: skip
    return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)


_CUDNN_FROM = 1 << 40
"""Products and sums of the scores, and as many of the values, from which cuDNN's kernel pays for being prepared."""
_COMES_AGAIN = 1024
"""Numbers of tokens of which both sizes are multiples come again, as stages cut prompts there
(`runtime.pipeline.chunks`): what is prepared for them pays from a sixteenth of that on. On an H200 it takes some 10 ms,
which is less than the other kernel loses in the layers of one stage. What is captured comes again and again: from a
64th."""


def _pays_cudnn(q: Tensor, k: Tensor) -> bool:
    past = k.shape[2] - q.shape[2]
    work = 2 * q.shape[0] * q.shape[1] * q.shape[2] * (past + q.shape[2] // 2) * q.shape[3]
    comes_again = past > 0 and past % _COMES_AGAIN == 0 and q.shape[2] % _COMES_AGAIN == 0
    return past >= 0 and q.shape[3] <= _WIDEST_OF_CUDNN and _pays(work, q.device, comes_again=comes_again)


def pays_cudnn_part(q: Tensor, k: Tensor, *, causal: bool) -> bool:
    """Whether `cudnn_part` is worth being prepared for these sizes, which `can_flash` has allowed."""
    keys = min(q.shape[2], k.shape[2]) // 2 if causal else k.shape[2]
    comes_again = q.shape[2] % _COMES_AGAIN == 0 and k.shape[2] % _COMES_AGAIN == 0
    work = 2 * q.shape[0] * q.shape[1] * q.shape[2] * keys * q.shape[3]
    return q.shape[3] <= _WIDEST_OF_CUDNN and _pays(work, q.device, comes_again=comes_again)


def _pays(work: int, device: torch.device, *, comes_again: bool) -> bool:
    least = _CUDNN_FROM >> 6 if is_replayed() else _CUDNN_FROM >> 4 if comes_again else _CUDNN_FROM
    return work >= least and _has_cudnn(device) and not missing_for_triton()


@functools.cache
def _has_cudnn(device: torch.device) -> bool:
    return (
        torch.cuda.get_device_capability(device)[0] == 9
        and torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        and torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    )


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    past = k.shape[2] - q.shape[2]
    out, lse = cudnn_part(q, k[:, :, past:], v[:, :, past:], scale=scale, causal=True)
    if past:
        merge_part(out, lse, *cudnn_part(q, k[:, :, :past], v[:, :, :past], scale=scale, causal=False))
    return out, lse


def cudnn_part(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention to these keys, causal from the top left: query i sees keys 0 to i; the result and its log-sum-exp."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse.view(q.shape[:3])


def flash_behind(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """The same of one row, B = 1, of which the device alone knows how many of the T keys are its own: the first ones.

    lengths: [2, 2] int32, 0 and S, 0 and the number of keys.
    """
    of_tokens = (x[0].transpose(0, 1) for x in (q, keys, values))
    out, *_ = torch.ops.aten._flash_attention_forward(
        *of_tokens, lengths[0], lengths[1], q.shape[2], keys.shape[2], 0.0, True, False, scale=scale,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
    )  # fmt: skip
    found: Tensor = out.transpose(0, 1)[None]
    return found


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
