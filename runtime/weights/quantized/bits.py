"""Codes of four bits, several in a word, as numbers from 0 to 15."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["nibbles", "pack_nibbles"]


def nibbles(words: Tensor, start: int, stop: int, order: Sequence[int] | None = None) -> Tensor:
    """Codes `start` to `stop` of the last dim, whose words (integers of any size) begin with the word of `start`.

    The lowest bits come first; `order[i]`: the place within eight of code i, where it is another.
    """
    per_word = 2 * words.element_size()
    packed = words.contiguous().view(torch.uint8)
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
