"""Rows of numbers as float8, with a scale for each block of 128 numbers of a row.

    rows [.., D]  ->  codes uint8 [.., D], the bits of float8_e4m3fn     scales float32 [.., ceil(D / 128)]
    number = float8(code) * scale        scale = the largest magnitude of the block / 448

Of keys or values [B, G, S, D] that is a scale per token and head, or several where a head is wider than 128. An error
is at most 1/16 of the number, or 2^-10 of the block's scale where that is more: e4m3 has three bits of fraction, and
its smallest numbers are 2^-9 apart. Format: arXiv:2209.05433, section 3; blocks of 128: arXiv:2412.19437, section
3.3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["BLOCK", "SCALE_BYTES", "from_float8", "num_scales", "to_float8"]

BLOCK = 128
SCALE_BYTES = 4
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def num_scales(width: int) -> int:
    """Of a row of `width` numbers."""
    return -(-width // BLOCK)


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales; a block of zeros has the scale 1."""
    width = rows.shape[-1]
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    padded = functional.pad(wide, (0, num_scales(width) * BLOCK - width))
    blocks = padded.view(*padded.shape[:-1], num_scales(width), BLOCK)
    largest = blocks.abs().amax(-1)
    # by a tensor: by a number a GPU multiplies with its rounded inverse, and a number between two codes, as many of
    # bfloat16 are, would fall to the other one than in kernels
    scales = (largest / torch.full_like(largest, _LARGEST)).float()
    # a number so small that its scale would be none is rounded to zero
    scales = torch.where(scales > torch.finfo(torch.float32).tiny, scales, torch.ones_like(scales))
    codes = (blocks / scales[..., None]).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes.flatten(-2)[..., :width], scales


def from_float8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers, in `dtype`."""
    width = codes.shape[-1]
    wide = codes.contiguous().view(torch.float8_e4m3fn).to(torch.promote_types(dtype, torch.float32))
    each = scales if num_scales(width) == 1 else scales.repeat_interleave(BLOCK, -1)[..., :width]
    return (wide * each).to(dtype)
