"""torch's kernels for GPUs that say the log-sum-exp of the scores beside the result.

    cuDNN        halves on Hopper, heads of one width up to 128, no mask, much work; nearly twice flash
    flash        halves, heads of one width, no mask; grouped heads without copies
    efficient    float32 too, values of another width, an additive mask; one kv head for each query head

A query that sees nothing, and heads whose width the kernels cannot load, are the caller's matter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from runtime.ops.attention import per_query_head
from runtime.ops.kernels.flash_attention import can_flash, cudnn_part, pays_cudnn_part

__all__ = ["by_cuda_kernel"]

_ALIGNED = 8
"""A row of a mask starts at a multiple of so many elements."""


def by_cuda_kernel(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) as `partial_attention` has them; None where no kernel takes these."""
    if mask is None and can_flash(q, v):
        if pays_cudnn_part(q, k, causal=causal):
            return cudnn_part(q, k, v, scale=scale, causal=causal)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, q.shape[2], k.shape[2], 0.0, causal,
            False, scale=scale,
        )  # fmt: skip
        return out.transpose(1, 2), lse
    aligned = 4 if q.dtype == torch.float32 else _ALIGNED
    if q.dtype == torch.float64 or q.shape[-1] % aligned or v.shape[-1] % aligned:
        return None
    heads, size = q.shape[1], k.shape[2]
    if mask is not None:
        mask = mask.to(q.dtype).expand(*([1] * (4 - mask.dim())), *mask.shape[:-1], size)
        mask = functional.pad(mask, (0, -size % _ALIGNED))[..., :size].expand(q.shape[0], heads, q.shape[2], size)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, per_query_head(k, heads), per_query_head(v, heads), mask, True, 0.0, causal, scale=scale
    )
    return out, lse[:, :, : q.shape[2]]
