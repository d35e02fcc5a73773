"""One new token over a cache whose tokens ranks share out: what stands around the kernel of `decode_attention`.

    own_or_last    the key and value that a rank appends: the token's, or its own last ones once more; and rotates
    packed         the result and its log-sum-exp as one row of float32, neutral where a rank keeps nothing yet
    merged         such rows of all ranks as one result (arXiv:2411.01783, section 3.3)

Each is one launch; torch's own operations for them are 25.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["merged", "own_or_last", "packed"]


@triton.jit
def _rotated(x, cos, sin, dims, is_wanted, HALF: tl.constexpr, D: tl.constexpr):
    found = tl.load(x + dims, mask=(dims < D) & is_wanted, other=0.0)
    if HALF != 0:
        straight = tl.load(cos + dims, mask=dims < D, other=0.0).to(tl.float32)
        across = tl.load(sin + dims, mask=dims < D, other=0.0).to(tl.float32)
        other = tl.load(x + (dims + HALF) % D, mask=(dims < D) & is_wanted, other=0.0)
        found = (found.to(tl.float32) * straight + other.to(tl.float32) * across).to(found.dtype)
    return found


@triton.jit
def own_or_last(
    new_key,
    new_value,
    keys,
    values,
    is_own,
    before,
    key,
    value,
    at,
    q,
    query,
    cos,
    sin,
    pairs,
    key_row,
    key_head,
    value_row,
    value_head,
    cos_row,
    sin_row,
    HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr,
    HALF: tl.constexpr,
):
    """A program per row and kv head, `pairs` of them. key_row, key_head: strides of the cache, in which the slots of a
    head follow. HALF: a new key becomes x * cos + roll(x, -HALF) * sin, and so do the queries, in a program for each
    head behind the others; 0: they have.
    """
    pair = tl.program_id(0)
    if pair >= pairs:
        number = pair - pairs
        row = number // QUERY_HEADS
        dims = tl.arange(0, D_PADDED)
        found = _rotated(q + number * D, cos + row * cos_row, sin + row * sin_row, dims, True, HALF, D)
        tl.store(query + number * D + dims, found, mask=dims < D)
        return
    row, head = pair // HEADS, pair % HEADS
    own = tl.load(is_own + row) != 0
    place = tl.maximum(tl.load(before + row) - tl.where(own, 0, 1), 0).to(tl.int64)
    if head == 0:
        tl.store(at + row, place)
    dims, value_dims = tl.arange(0, D_PADDED), tl.arange(0, DV_PADDED)
    kept = keys + row.to(tl.int64) * key_row + head.to(tl.int64) * key_head + place * D
    found = _rotated(new_key + pair * D, cos + row * cos_row, sin + row * sin_row, dims, own, HALF, D)
    found = tl.where(own, found, tl.load(kept + dims, mask=(dims < D) & (own == 0)))
    tl.store(key + pair * D + dims, found, mask=dims < D)
    kept = values + row.to(tl.int64) * value_row + head.to(tl.int64) * value_head + place * DV
    found = tl.load(new_value + pair * DV + value_dims, mask=(value_dims < DV) & own)
    found = tl.where(own, found, tl.load(kept + value_dims, mask=(value_dims < DV) & (own == 0)))
    tl.store(value + pair * DV + value_dims, found, mask=value_dims < DV)


@triton.jit
def packed(out, lse, is_own, before, rows, HEADS: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr):
    """A program per row and head; rows: of DV + 1 numbers."""
    number = tl.program_id(0)
    row = number // HEADS
    has_any = (tl.load(is_own + row) != 0) | (tl.load(before + row) > 0)
    dims = tl.arange(0, DV_PADDED)
    found = tl.load(out + number * DV + dims, mask=(dims < DV) & has_any, other=0.0).to(tl.float32)
    tl.store(rows + number * (DV + 1) + dims, found, mask=dims < DV)
    tl.store(rows + number * (DV + 1) + DV, tl.where(has_any, tl.load(lse + number), float("-inf")))


@triton.jit
def merged(parts, out, num_rows, PARTS: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr):
    """A program per row; parts: [P, rows, DV + 1], merged in order, so that all ranks have the same bits."""
    number = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DV_PADDED)
    top = tl.load(parts + number * (DV + 1) + DV)
    for part in tl.static_range(1, PARTS):
        top = tl.maximum(top, tl.load(parts + (part * num_rows + number) * (DV + 1) + DV))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = base * 0.0
    found = tl.zeros((DV_PADDED,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        at = parts + (part * num_rows + number) * (DV + 1)
        weight = tl.exp(tl.load(at + DV) - base)
        total += weight
        found += weight * tl.load(at + dims, mask=dims < DV, other=0.0)
    tl.store(out + number * DV + dims, found / tl.where(total == 0, 1.0, total), mask=dims < DV)
