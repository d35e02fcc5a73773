"""What ranks have come to over tokens of their own, as one result, where a gather has brought it."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["merged"]


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
