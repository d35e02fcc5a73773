"""The kernels of `stored_linear.py`: products with a matrix that is dequantised where it is used.

    x [M, K]   codes [E, N, K] or [E, N, K/2]   scales, zeros [R, G]   rows [E, N]   columns [K]   ->   [M, N]

    tiles       a program computes a tile of [TILE_N, TILE_M] of one expert and goes over K. Where the columns of a tile
                share their scale, codes are multiplied as they are, and the sum is scaled; else the weights are rounded
                to the dtype of x first. Products of tiles are added in float32
    one_row     a program computes TILE_N numbers of one row, by multiplying and adding: each thread takes 16 bytes of
                codes at a time, whose columns share a scale, of all TILE_N rows, so that x is unpacked once for them

For one token either is bound by the memory that it reads, which is that of the codes: a half or a quarter of what
bfloat16 takes; so codes must cost few instructions each. Which expert a row belongs to is read on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["one_row", "tiles"]

# four bytes of two codes each; byte i becomes the half `0x43 << 8 | code` (128 and the code, exactly), or of float16
# `0x64 << 8 | code` (1024 and the code)
_INTEGER4 = """{{
    .reg .b32 low, high;
    and.b32 low, $4, 0x0f0f0f0f;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0f0f0f0f;
    prmt.b32 $0, low, {0}, 0x4140;
    prmt.b32 $1, low, {0}, 0x4342;
    prmt.b32 $2, high, {0}, 0x4140;
    prmt.b32 $3, high, {0}, 0x4342;
}}"""
_INTEGER4_BFLOAT = tl.constexpr(_INTEGER4.format("0x43434343"))
_INTEGER4_HALF = tl.constexpr(_INTEGER4.format("0x64646464"))
# the same of float4: three bits of a code look up the upper and the lower byte of its size, the fourth is its sign
_FLOAT4 = """{{
    .reg .b32 code, size, sign, upper, lower;
    mov.b32 code, $4;
    and.b32 size, code, 0x7777;
    prmt.b32 upper, {0}, {1}, size;
    prmt.b32 lower, {2}, {3}, size;
    shr.u32 sign, code, 3;
    and.b32 sign, sign, 0x1111;
    prmt.b32 sign, 0x00008000, 0, sign;
    or.b32 upper, upper, sign;
    prmt.b32 $0, lower, upper, 0x6240;
    prmt.b32 $2, lower, upper, 0x7351;
    shr.u32 code, code, 16;
    and.b32 size, code, 0x7777;
    prmt.b32 upper, {0}, {1}, size;
    prmt.b32 lower, {2}, {3}, size;
    shr.u32 sign, code, 3;
    and.b32 sign, sign, 0x1111;
    prmt.b32 sign, 0x00008000, 0, sign;
    or.b32 upper, upper, sign;
    prmt.b32 $1, lower, upper, 0x6240;
    prmt.b32 $3, lower, upper, 0x7351;
}}"""
_FLOAT4_BFLOAT = tl.constexpr(_FLOAT4.format("0x3f3f3f00", "0x40404040", "0xc0800000", "0xc0804000"))
_FLOAT4_HALF = tl.constexpr(_FLOAT4.format("0x3e3c3800", "0x46444240", "0", "0"))


@triton.jit
def _float4(code):
    """Sign, two bits of exponent, one of mantissa: 0, 0.5, then 1 and 1.5 times 1, 2 and 4."""
    # as the bits of a float32 that is 2^126 times smaller
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _two(byte, CODE: tl.constexpr, BFLOAT: tl.constexpr, PTX: tl.constexpr):
    """What the lower and the upper four bits of uint8 stand for, as halves or float32; integers plus `_more`."""
    if not PTX:
        low, high = (byte & 15).to(tl.int32), (byte >> 4).to(tl.int32)
        if CODE == 1:
            return _float4(low), _float4(high)
        else:
            return low.to(tl.float32) + _more(BFLOAT), high.to(tl.float32) + _more(BFLOAT)
    elif BFLOAT:
        return tl.inline_asm_elementwise(
            _FLOAT4_BFLOAT if CODE == 1 else _INTEGER4_BFLOAT, "=r,=r,=r,=r,r", [byte],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _FLOAT4_HALF if CODE == 1 else _INTEGER4_HALF, "=r,=r,=r,=r,r", [byte],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _more(BFLOAT: tl.constexpr):
    return 128.0 if BFLOAT else 1024.0


@triton.jit
def _even_and_odd(pair, BFLOAT: tl.constexpr):
    """Two halves that lie together in int32, as float32."""
    if BFLOAT:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        even = (pair & 65535).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = ((pair >> 16) & 65535).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        return even, odd


@triton.jit
def _scale(scales, place, mask, EXPONENTS: tl.constexpr):
    scale = tl.load(scales + place, mask=mask, other=0)
    if EXPONENTS:
        scale = tl.exp2(scale.to(tl.float32) - 127.0)
    else:
        scale = scale.to(tl.float32)
    return scale


@triton.jit
def tiles(
    x, codes, scales, zeros, rows, columns, bias, counts, out, M, N, K, E, stride_x, stride_codes, stride_scales,
    CODE: tl.constexpr, EXPONENTS: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, EXPERTS: tl.constexpr,
    BFLOAT: tl.constexpr, PTX: tl.constexpr, EXACT: tl.constexpr, SHARED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """EXPERTS: their number, padded, or 0. SHARED: the columns of a tile share their scale; then x has halves, and of
    codes of four bits pairs of them as int32, and `stride_x` is theirs.
    """
    tile = tl.program_id(1)
    at_n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    at_m = tile * TILE_M + tl.arange(0, TILE_M)
    end = M
    line = at_n.to(tl.int64)
    is_n = at_n < N
    if EXPERTS:
        expert = tl.arange(0, EXPERTS)
        count = tl.load(counts + expert, mask=expert < E, other=0).to(tl.int32)
        tiles_of = tl.cdiv(count, TILE_M)
        tiles_until, rows_until = tl.cumsum(tiles_of, 0), tl.cumsum(count, 0)
        own = tl.sum((tiles_until <= tile).to(tl.int32))
        if own >= E:
            return
        is_own = expert == own
        within = tile - tl.sum(tl.where(is_own, tiles_until - tiles_of, 0))
        end = tl.sum(tl.where(is_own, rows_until, 0))
        at_m = end - tl.sum(tl.where(is_own, count, 0)) + within * TILE_M + tl.arange(0, TILE_M)
        line += own.to(tl.int64) * N
    row = tl.load(rows + line, mask=is_n, other=0).to(tl.int64)
    codes_at = codes + line[:, None] * stride_codes
    x_at = x + at_m[None, :].to(tl.int64) * stride_x
    is_m = at_m < end
    total = tl.zeros((TILE_N, TILE_M), dtype=tl.float32)
    for start in range(0, K, TILE_K):
        if SHARED:
            place = row * stride_scales + tl.load(columns + start)
            scale = _scale(scales, place, is_n, EXPONENTS)
            if CODE == 0:
                at_k = start + tl.arange(0, TILE_K)
                is_k = at_k < K
                right = tl.load(x_at + at_k[:, None], mask=is_k[:, None] & is_m[None, :], other=0.0)
                left = tl.load(codes_at + at_k[None, :], mask=is_n[:, None] & is_k[None, :], other=0.0)
                part = tl.dot(left.to(right.dtype), right)
            else:
                at_k = start // 2 + tl.arange(0, TILE_K // 2)
                is_k = at_k < K // 2
                pair = tl.load(x_at + at_k[:, None], mask=is_k[:, None] & is_m[None, :], other=0)
                even, odd = _even_and_odd(pair, BFLOAT)
                byte = tl.load(codes_at + at_k[None, :], mask=is_n[:, None] & is_k[None, :], other=0)
                low, high = _two(byte, CODE, BFLOAT, PTX)
                if CODE == 2:
                    if ZEROS:
                        zero = tl.load(zeros + place, mask=is_n, other=0).to(tl.float32) + _more(BFLOAT)
                    else:
                        zero = tl.full((TILE_N,), 8.0, tl.float32) + _more(BFLOAT)
                    zero = zero.to(low.dtype)[:, None]
                    low, high = low - zero, high - zero
                part = tl.dot(low, even.to(low.dtype))
                part = tl.dot(high, odd.to(high.dtype), acc=part)
            total += part * scale[:, None]
        else:
            at_k = start + tl.arange(0, TILE_K)
            is_k = at_k < K
            inside = is_n[:, None] & is_k[None, :]
            right = tl.load(x_at + at_k[:, None], mask=is_k[:, None] & is_m[None, :], other=0.0)
            place = row[:, None] * stride_scales + tl.load(columns + at_k, mask=is_k, other=0)[None, :]
            scale = _scale(scales, place, inside, EXPONENTS)
            if CODE == 0:
                number = tl.load(codes_at + at_k[None, :], mask=inside, other=0.0).to(tl.float32)
            else:
                byte = tl.load(codes_at + at_k[None, :] // 2, mask=inside, other=0).to(tl.int32)
                code = (byte >> ((at_k[None, :] % 2) * 4)) & 15
                if CODE == 1:
                    number = _float4(code)
                else:
                    number = code.to(tl.float32)
                    if ZEROS:
                        number -= tl.load(zeros + place, mask=inside, other=0).to(tl.float32)
                    else:
                        number -= 8.0
            left = tl.where(inside, number * scale, 0.0).to(right.dtype)
            total = tl.dot(left, right, acc=total, input_precision="ieee" if EXACT else "tf32")
    if BIAS:
        total += tl.load(bias + line, mask=is_n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out + at_m[None, :].to(tl.int64) * N + at_n[:, None],
        total.to(out.dtype.element_ty),
        mask=is_m[None, :] & is_n[:, None],
    )


@triton.jit
def one_row(
    x, codes, scales, zeros, rows, columns, bias, counts, out, N, K, E, stride_x, stride_codes, stride_scales,
    CODE: tl.constexpr, EXPONENTS: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, EXPERTS: tl.constexpr,
    BFLOAT: tl.constexpr, PTX: tl.constexpr, RUN: tl.constexpr, TILE_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """RUN: columns of a thread at a time, which divide K; CHUNKS: how many such at a time. BFLOAT: bfloat16. X holds
    halves; of codes of four bits, pairs of them as int32, and `stride_x` is theirs.
    """
    at_n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    token = tl.program_id(1)
    line = at_n.to(tl.int64)
    is_n = at_n < N
    if EXPERTS:
        expert = tl.arange(0, EXPERTS)
        until = tl.cumsum(tl.load(counts + expert, mask=expert < E, other=0).to(tl.int32), 0)
        own = tl.sum(((until <= token) & (expert < E)).to(tl.int32))
        is_n = is_n & (own < E)
        line += tl.minimum(own, E - 1).to(tl.int64) * N
    row = tl.load(rows + line, mask=is_n, other=0).to(tl.int64)
    x += token.to(tl.int64) * stride_x
    # chunks first: the compiler gives a warp's lanes to them, and each lane all rows
    codes_at = codes + line[None, :, None] * stride_codes
    total = tl.zeros((CHUNKS, TILE_N), dtype=tl.float32)
    for start in range(0, K, CHUNKS * RUN):
        at_k = start + tl.arange(0, CHUNKS) * RUN
        is_chunk = at_k < K
        inside = is_chunk[:, None] & is_n[None, :]
        place = tl.load(columns + at_k, mask=is_chunk, other=0)[:, None] + row[None, :] * stride_scales
        scale = _scale(scales, place, inside, EXPONENTS)
        if CODE == 0:
            column = at_k[:, None] + tl.arange(0, RUN)[None, :]
            left = tl.load(x + column, mask=is_chunk[:, None], other=0.0).to(tl.float32)
            number = tl.load(codes_at + column[:, None, :], mask=inside[:, :, None], other=0.0)
            total += tl.sum(number.to(tl.float32) * left[:, None, :], axis=2) * scale
        else:
            # not at_k // 2, of which the compiler does not know that a thread's bytes begin at a multiple of 16
            column = start // 2 + tl.arange(0, CHUNKS)[:, None] * (RUN // 2) + tl.arange(0, RUN // 2)[None, :]
            even, odd = _even_and_odd(tl.load(x + column, mask=is_chunk[:, None], other=0), BFLOAT)
            byte = tl.load(codes_at + column[:, None, :], mask=inside[:, :, None], other=0)
            low, high = _two(byte, CODE, BFLOAT, PTX)
            part = tl.sum(low.to(tl.float32) * even[:, None, :], axis=2)
            part += tl.sum(high.to(tl.float32) * odd[:, None, :], axis=2)
            if CODE == 2:
                whole = tl.sum(even + odd, axis=1)[:, None]
                if ZEROS:
                    zero = tl.load(zeros + place, mask=inside, other=0).to(tl.float32)
                    part -= (zero + _more(BFLOAT)) * whole
                else:
                    part -= (8.0 + _more(BFLOAT)) * whole
            total += part * scale
    result = tl.sum(total, axis=0)
    if BIAS:
        result += tl.load(bias + line, mask=is_n, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * N + at_n, result.to(out.dtype.element_ty), mask=is_n)
