"""One more part of an attention, merged in one pass over memory: see `runtime.ops.kernels.merge.merge_kernel`."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.ops.kernels.triton_needs import launch, missing_for_triton

__all__ = ["can_merge", "merge_part"]

_ROWS = 16
"""Queries that one program merges."""


def can_merge(total: Tensor, out: Tensor) -> bool:
    """Whether the kernel takes these; where many parts are merged, one after the other, `total` is best float32."""
    return (
        total.device.type == "cuda"
        and total.dtype != torch.float64
        and total.stride(-1) == out.stride(-1) == 1
        and total.numel() > 0
        and not missing_for_triton()
    )


def merge_part(total: Tensor, sums: Tensor, out: Tensor, lse: Tensor) -> None:
    """The `total` [B, H, S, Dv] and `sums` [B, H, S] become what they and the part (out, lse) are together."""
    from runtime.ops.kernels.merge.merge_kernel import merge  # Triton comes with torch for GPUs only

    batch, heads, size, width = total.shape
    num_rows = batch * heads * size
    strides = *total.stride()[:3], *sums.stride(), *out.stride()[:3], *lse.stride()
    launch(
        merge, (-(-num_rows // _ROWS), 1, 1), (total, sums, out, lse, num_rows, heads, size, *strides),
        WIDTH=width, WIDTH_PADDED=1 << (width - 1).bit_length(), ROWS=_ROWS,
    )  # fmt: skip
