"""One more part of an attention, merged into what others are together, in one pass over memory; a kernel of Triton.

    total, sums   [B, H, S, Dv], [B, H, S]   written in place; sums float32
    out, lse      the same shapes            of the part

A program takes `ROWS` queries. The arithmetic is that of `partial_attention.Merged`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["merge"]


@triton.jit
def merge(
    total,
    sums,
    out,
    lse,
    num_rows,
    heads,
    size,
    total_batch,
    total_head,
    total_row,
    sums_batch,
    sums_head,
    sums_row,
    out_batch,
    out_head,
    out_row,
    lse_batch,
    lse_head,
    lse_row,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Strides in elements; values of a query lie one after the other."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    batch, head, query = row // (heads * size), row // size % heads, row % size
    column = tl.arange(0, WIDTH_PADDED)
    is_value = is_row[:, None] & (column < WIDTH)[None, :]
    at_sum = sums + batch * sums_batch + head * sums_head + query * sums_row
    at_total = total + (batch * total_batch + head * total_head + query * total_row)[:, None] + column[None, :]
    at_out = out + (batch * out_batch + head * out_head + query * out_row)[:, None] + column[None, :]
    before = tl.load(at_sum, mask=is_row, other=float("-inf"))
    new = tl.load(lse + batch * lse_batch + head * lse_head + query * lse_row, mask=is_row, other=float("-inf"))
    top = tl.maximum(before, new)
    # nothing seen yet, and nothing new: minus infinity from itself is no number
    base = tl.where(top == float("-inf"), 0.0, top)
    old_weight, new_weight = tl.exp(before - base), tl.exp(new - base)
    weight = old_weight + new_weight
    share = 1.0 / tl.where(weight == 0, 1.0, weight)
    held = tl.load(at_total, mask=is_value, other=0.0).to(tl.float32)
    part = tl.load(at_out, mask=is_value, other=0.0).to(tl.float32)
    merged = held * (old_weight * share)[:, None] + part * (new_weight * share)[:, None]
    tl.store(at_total, merged, mask=is_value)
    tl.store(
        at_sum, tl.where(weight == 0, float("-inf"), base + tl.log(tl.where(weight == 0, 1.0, weight))), mask=is_row
    )
