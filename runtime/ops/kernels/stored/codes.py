"""Codes of quantised weights: unpacked, packed, and as the numbers they stand for before they are scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CODES", "FLOAT4", "Stored", "exponents", "nibbles", "numbers", "pack_nibbles"]

FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of four bits with two of exponent and one of mantissa."""
_BIAS = 127
CODES = {"float8": 0, "float4": 1, "int4": 2}
"""What kernels call them."""


class Stored(NamedTuple):
    """A weight [N, K] as `stored_linear.py` has it. code: "float8", "float4" or "int4"."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    rows: Tensor
    columns: Tensor
    code: str


def numbers(codes: Tensor, code: str, dtype: torch.dtype) -> Tensor:
    """What codes stand for, one element each; `code`: "float8", "float4" or "int4"."""
    if code != "float4":
        return codes.to(dtype)
    return torch.tensor(FLOAT4, dtype=dtype, device=codes.device)[codes.to(torch.int32)]


def exponents(scales: Tensor) -> Tensor:
    """Scales that are stored as powers of two, in one byte each."""
    return torch.pow(2.0, scales.to(torch.int32) - _BIAS)


def nibbles(words: Tensor, start: int, stop: int, order: Sequence[int] | None = None) -> Tensor:
    """Codes `start` to `stop` of the last dim, whose words (integers of any size) begin with the word of `start`.

    The lowest bits come first; `order[i]`: the place within eight of code i, where it is another.
    """
    size = words.element_size()
    per_word = 2 * size
    # flat and dense first: where a dim has one index, its stride may be anything, and torch views no bytes of that
    flat = words.reshape(-1)
    flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)
    packed = flat.view(torch.uint8).view(*words.shape[:-1], size * words.shape[-1])
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    if order is not None:
        codes = codes.reshape(*codes.shape[:-1], -1, len(order))[..., list(order)].flatten(-2)
    first = start % per_word
    return codes.narrow(-1, first, stop - start)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes of the last dim in a byte, the lower bits first; an odd number is filled up with a zero."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)
