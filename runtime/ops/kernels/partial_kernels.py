"""torch's kernels for GPUs that say the log-sum-exp of the scores beside the result.

    flash        halves, heads of one width, no mask; grouped heads without copies
    efficient    float32 too, values of another width, an additive mask; one kv head for each query head

and one of ours that merges such parts: what it costs beside them is a pass over memory, not six.

A query that sees nothing, and heads whose width the kernels cannot load, are the caller's matter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from runtime.ops.attention import per_query_head
from runtime.ops.kernels.flash_attention import can_flash
from runtime.ops.kernels.triton_needs import missing_for_triton

__all__ = ["by_cuda_kernel", "can_merge", "merge_in_place"]

_ALIGNED = 8
"""A row of a mask starts at a multiple of so many elements."""
_ROWS = 16
"""Queries that one program merges."""


def by_cuda_kernel(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(out, lse) as `partial_attention` has them; None where no kernel takes these."""
    if mask is None and can_flash(q, v):
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


def can_merge(total: Tensor, out: Tensor) -> bool:
    """Whether the kernel takes these."""
    return (
        total.device.type == "cuda"
        and total.dtype == torch.float32
        and total.stride(-1) == out.stride(-1) == 1
        and total.numel() > 0
        and not missing_for_triton()
    )


def merge_in_place(total: Tensor, sums: Tensor, out: Tensor, lse: Tensor) -> None:
    """The `total` [B, H, S, Dv] and `sums` [B, H, S] become what they and the part (out, lse) are together."""
    from runtime.ops.kernels.merge_kernel import merge  # Triton comes with torch for GPUs only

    batch, heads, size, width = total.shape
    num_rows = batch * heads * size
    merge[(-(-num_rows // _ROWS),)](
        total, sums, out, lse, num_rows, heads, size,
        *total.stride()[:3], *sums.stride(), *out.stride()[:3], *lse.stride(),
        WIDTH=width, WIDTH_PADDED=1 << (width - 1).bit_length(), ROWS=_ROWS,
    )  # fmt: skip
