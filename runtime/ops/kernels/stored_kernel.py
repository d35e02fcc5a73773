"""The kernels of `runtime.ops.kernels.stored`: products with a matrix that is dequantised where it is used.

    x [M, K]   codes [E, N, K] or [E, N, K/2]   scales, zeros [R, G]   rows [E, N]   columns [K]   ->   [M, N]

    tiles       a program computes a tile of [TILE_M, TILE_N] of one expert and goes over K: it rounds the weights to
                the dtype of x, and adds products of tiles in float32
    one row     a program computes TILE_N numbers of one row; CHUNKS runs of columns that share a scale at a time are
                multiplied as they are and summed, and the sum is scaled

For one token either is bound by the memory that it reads, which is that of the codes: a half or a quarter of what
bfloat16 takes. Which expert a row belongs to is read on the device. `run`: so many columns, one after the other, share
their scale wherever a multiple of it begins; 0: any column may have any scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["one_row", "tiles"]


@triton.jit
def _float4(code):
    """Sign, two bits of exponent, one of mantissa: 0, 0.5, then 1 and 1.5 times 1, 2 and 4."""
    # as the bits of a float32 that is 2^126 times smaller
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def _integer4(code):
    """The number of a code of four bits: beside the bits of 2^23, and without it again."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


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
    CODE: tl.constexpr, EXPONENTS: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
    EXPERTS: tl.constexpr, SHARED: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """EXPERTS: their number, padded, or 0. SHARED: the columns of a tile share their scale."""
    tile = tl.program_id(0)
    at_n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
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
        is_own = expert == own
        within = tile - tl.sum(tl.where(is_own, tiles_until - tiles_of, 0))
        end = tl.sum(tl.where(is_own, rows_until, 0))
        at_m = end - tl.sum(tl.where(is_own, count, 0)) + within * TILE_M + tl.arange(0, TILE_M)
        is_n = is_n & (own < E)
        line += tl.minimum(own, E - 1).to(tl.int64) * N
    row = tl.load(rows + line, mask=is_n, other=0).to(tl.int64)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for start in range(0, K, TILE_K):
        at_k = start + tl.arange(0, TILE_K)
        inside = (at_k[:, None] < K) & is_n[None, :]
        left = tl.load(
            x + at_m[:, None].to(tl.int64) * stride_x + at_k[None, :],
            mask=(at_m[:, None] < end) & (at_k[None, :] < K),
            other=0.0,
        )
        if SHARED:
            place = row[None, :] * stride_scales + tl.load(columns + start)
            scale = _scale(scales, place, is_n[None, :], EXPONENTS)
        else:
            group = tl.load(columns + at_k, mask=at_k < K, other=0)
            place = row[None, :] * stride_scales + group[:, None]
            scale = _scale(scales, place, inside, EXPONENTS)
        codes_at = codes + line[None, :] * stride_codes
        if CODE == 0:
            number = tl.load(codes_at + at_k[:, None], mask=inside, other=0.0).to(tl.float32)
        else:
            byte = tl.load(codes_at + at_k[:, None] // 2, mask=inside, other=0).to(tl.int32)
            code = (byte >> ((at_k[:, None] % 2) * 4)) & 15
            if CODE == 1:
                number = _float4(code)
            else:
                number = _integer4(code)
                if ZEROS:
                    number -= tl.load(zeros + place, mask=is_n[None, :] if SHARED else inside, other=0).to(tl.float32)
                else:
                    number -= 8.0
        right = (number * scale).to(left.dtype)
        right = tl.where(inside, right, 0.0)
        total = tl.dot(left, right, acc=total, input_precision="ieee" if EXACT else "tf32")
    if BIAS:
        total += tl.load(bias + line, mask=is_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + at_m[:, None].to(tl.int64) * N + at_n[None, :],
        total.to(out.dtype.element_ty),
        mask=(at_m[:, None] < end) & is_n[None, :],
    )


@triton.jit
def one_row(
    x, codes, scales, zeros, rows, columns, bias, counts, out, N, K, E, stride_x, stride_codes, stride_scales,
    CODE: tl.constexpr, EXPONENTS: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, EXPERTS: tl.constexpr,
    BFLOAT: tl.constexpr, RUN: tl.constexpr, TILE_N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """X holds halves; of codes of four bits, pairs of them as int32, and `stride_x` is theirs. BFLOAT: bfloat16."""
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
    codes_at = codes + line[:, None, None] * stride_codes
    total = tl.zeros((TILE_N, CHUNKS), dtype=tl.float32)
    for start in range(0, K, CHUNKS * RUN):
        at_k = start + tl.arange(0, CHUNKS) * RUN
        is_chunk = at_k < K
        inside = is_n[:, None] & is_chunk[None, :]
        place = row[:, None] * stride_scales + tl.load(columns + at_k, mask=is_chunk, other=0)[None, :]
        scale = _scale(scales, place, inside, EXPONENTS)
        if CODE == 0:
            column = at_k[:, None] + tl.arange(0, RUN)[None, :]
            left = tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
            number = tl.load(codes_at + column[None], mask=is_n[:, None, None] & (column < K)[None], other=0.0)
            total += tl.sum(number.to(tl.float32) * left[None], axis=2) * scale
        else:
            column = at_k[:, None] // 2 + tl.arange(0, RUN // 2)[None, :]
            pair = tl.load(x + column, mask=column < K // 2, other=0)
            if BFLOAT:
                even = (pair << 16).to(tl.float32, bitcast=True)
                odd = (pair & -65536).to(tl.float32, bitcast=True)
            else:
                even = (pair & 65535).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                odd = ((pair >> 16) & 65535).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
            byte = tl.load(codes_at + column[None], mask=is_n[:, None, None] & (column < K // 2)[None], other=0).to(
                tl.int32
            )
            if CODE == 1:
                part = tl.sum(_float4(byte & 15) * even[None] + _float4(byte >> 4) * odd[None], axis=2)
            else:
                part = tl.sum(_integer4(byte & 15) * even[None] + _integer4(byte >> 4) * odd[None], axis=2)
                whole = tl.sum(even + odd, axis=1)
                if ZEROS:
                    part -= tl.load(zeros + place, mask=inside, other=0).to(tl.float32) * whole[None, :]
                else:
                    part -= 8.0 * whole[None, :]
            total += part * scale
    result = tl.sum(total, axis=1)
    if BIAS:
        result += tl.load(bias + line, mask=is_n, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * N + at_n, result.to(out.dtype.element_ty), mask=is_n)
