"""Rows as float8 with a scale for each block of 128 numbers, inside kernels: `runtime.ops.kernels.float8_rows`."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["largest_of", "numbers_of", "scale_of", "to_codes"]

# four codes, each in the upper byte of a half; then the sign stays, and the rest moves to where exponent and fraction
# are, as a number that is 2^120 times smaller, or of float16 2^8 times
_MOVED = """{{
    .reg .b32 low, high, more, factor, zero;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    shr.u32 more, low, {shift};
    and.b32 more, more, {mask};
    and.b32 low, low, 0x80008000;
    or.b32 low, low, more;
    shr.u32 more, high, {shift};
    and.b32 more, more, {mask};
    and.b32 high, high, 0x80008000;
    or.b32 high, high, more;
    mov.b32 factor, {factor};
    mov.b32 zero, 0x80008000;
    fma.rn.{type} $0, low, factor, zero;
    fma.rn.{type} $1, high, factor, zero;
}}"""
_TO_BFLOAT = tl.constexpr(_MOVED.format(shift=4, mask="0x07f007f0", factor="0x7b807b80", type="bf16x2"))
_TO_HALF = tl.constexpr(_MOVED.format(shift=1, mask="0x3f803f80", factor="0x5c005c00", type="f16x2"))


@triton.jit
def largest_of(row, block_of, block):
    """The largest magnitude of a block; block_of: of each number."""
    return tl.max(tl.where(block_of == block, tl.abs(row.to(tl.float32)), 0.0), axis=0)


@triton.jit
def scale_of(largest):
    scale = tl.div_rn(largest, 448.0)
    return tl.where(scale > 1.1754943508222875e-38, scale, 1.0)


@triton.jit
def to_codes(row, scales):
    """Codes, uint8; scales: of each number."""
    scaled = tl.div_rn(row.to(tl.float32), scales)
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    bits = scaled.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # to the nearest, and of two as near to the even one: three bits of fraction are left, exponents begin at -7
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 codes are 2^-9 apart, as float32 is from 2^14 on
    small = (tl.abs(scaled) + 16384.0).to(tl.int32, bitcast=True) & 15
    code = tl.where(size < (121 << 23), small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def numbers_of(codes, dtype: tl.constexpr, PTX: tl.constexpr):
    """What codes stand for before they are scaled, in `dtype`, or without PTX in float32."""
    if PTX and dtype == tl.bfloat16:
        numbers = tl.inline_asm_elementwise(
            _TO_BFLOAT, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )  # fmt: skip
    elif PTX and dtype == tl.float16:
        numbers = tl.inline_asm_elementwise(_TO_HALF, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        bits = codes.to(tl.int32)
        # as the bits of a float32 that is 2^120 times smaller
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        numbers = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return numbers
