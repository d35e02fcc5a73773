"""Rows as float8 with a scale for each block of 128 numbers, inside kernels: `runtime.ops.kernels.float8_rows`."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["largest_of", "numbers_of", "scale_of", "to_codes"]


@triton.jit
def largest_of(row, block_of, block):
    """The largest magnitude of a block; block_of: of each number."""
    return tl.max(tl.where(block_of == block, tl.abs(row.to(tl.float32)), 0.0), axis=0)


@triton.jit
def scale_of(largest):
    scale = tl.div_rn(largest, 448.0)
    return tl.where(scale > 1.1754943508222875e-38, scale, 1.0)


@triton.jit
def to_codes(row, scales, NATIVE: tl.constexpr):
    """scales: of each number. NATIVE: whether the device converts; else the codes are made of bits."""
    scaled = tl.div_rn(row.to(tl.float32), scales)
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    if NATIVE:
        codes = scaled.to(tl.float8e4nv)
    else:
        bits = scaled.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # to the nearest, and of two as near to the even one: three bits of fraction are left, exponents begin at -7
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        # below 2^-6 codes are 2^-9 apart, as float32 is from 2^14 on
        small = (tl.abs(scaled) + 16384.0).to(tl.int32, bitcast=True) & 15
        code = tl.where(size < (121 << 23), small, normal)
        codes = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return codes


@triton.jit
def numbers_of(codes, NATIVE: tl.constexpr):
    """What codes stand for before they are scaled: in float32, or as they are where the device converts them."""
    if NATIVE:
        numbers = codes
    else:
        bits = codes.to(tl.int32)
        # as the bits of a float32 that is 2^120 times smaller
        bits = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        numbers = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return numbers
