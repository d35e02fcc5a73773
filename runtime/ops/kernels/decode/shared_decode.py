"""Parts of an attention that ranks have over tokens of their own; see `decode_attention` (`is_own`)."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.ops.kernels.triton_needs import next_power_of_2

__all__ = ["merged_rows"]


def merged_rows(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 [P, .., Dv + 1] of all ranks, whose last number is the log-sum-exp, together (arXiv:2411.01783, section
    3.3): [.., Dv].
    """
    from runtime.ops.kernels.decode.shared_kernel import merged  # Triton comes with torch for GPUs only

    width, num_rows = parts.shape[-1] - 1, parts[0].numel() // parts.shape[-1]
    out = torch.empty(*parts.shape[1:-1], width, dtype=dtype, device=parts.device)
    if num_rows:
        merged[(num_rows,)](
            parts.contiguous(), out, num_rows, PARTS=parts.shape[0], DV=width, DV_PADDED=next_power_of_2(width),
            num_warps=1,
        )  # fmt: skip
    return out
