"""Rows of a rank's part of an embedding, zero where another rank has them: see `runtime.ops.embedding`; Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["look_up"]


@triton.jit
def look_up(ids, weight, out, start, rows, weight_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes BLOCK numbers of a token's row; weight [rows, WIDTH], from row `start` of the whole."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(ids + token) - start
    is_own = (local >= 0) & (local < rows)
    row = tl.load(weight + local * weight_row + column, mask=(column < WIDTH) & is_own, other=0.0)
    tl.store(out + token * WIDTH + column, row, mask=column < WIDTH)
