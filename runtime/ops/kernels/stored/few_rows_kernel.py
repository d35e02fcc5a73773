"""The product of a few rows with a matrix of codes and scales, and what stands around it, in one kernel of Triton.

As `runtime/ops/kernels/decode/few_rows_kernel.py`, with weights that are dequantised where they are used: each thread
takes 16 bytes of codes at a time, whose columns share a scale, of TILE_N rows of the matrix, so that x is read once for
them. The next codes are under way while those before are multiplied, and the first ones before the kernel before has
ended.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.ops.kernels.decode.few_rows_kernel import put, row_at
from runtime.ops.kernels.stored.stored_kernel import _float4

__all__ = ["few_rows"]

# Eight codes of four bits: bits 19 to 22 of a float32 whose exponent says 16, which is 16 and the code, exactly.
_INTEGER4 = tl.constexpr("""{
    .reg .b32 low, high;
    shl.b32 low, $8, 3;
    and.b32 low, low, 0x78787878;
    or.b32 low, low, 0x80808080;
    shr.u32 high, $8, 1;
    and.b32 high, high, 0x78787878;
    or.b32 high, high, 0x80808080;
    prmt.b32 $0, low, 0x41000000, 0x7044;
    prmt.b32 $1, high, 0x41000000, 0x7044;
    prmt.b32 $2, low, 0x41000000, 0x7144;
    prmt.b32 $3, high, 0x41000000, 0x7144;
    prmt.b32 $4, low, 0x41000000, 0x7244;
    prmt.b32 $5, high, 0x41000000, 0x7244;
    prmt.b32 $6, low, 0x41000000, 0x7344;
    prmt.b32 $7, high, 0x41000000, 0x7344;
}""")
# The same of float4: three bits of a code look up the upper two bytes of its size as a float32, the fourth is its sign.
_FLOAT4 = tl.constexpr("""{
    .reg .b32 size, upper, lower, sign, low, high;
    .reg .b32 at;
    and.b32 size, $8, 0x7777;
    prmt.b32 upper, 0x3f3f3f00, 0x40404040, size;
    prmt.b32 lower, 0xc0800000, 0xc0804000, size;
    shr.u32 sign, $8, 3;
    and.b32 sign, sign, 0x1111;
    prmt.b32 sign, 0x00008000, 0, sign;
    or.b32 upper, upper, sign;
    prmt.b32 low, lower, upper, 0x5140;
    prmt.b32 high, lower, upper, 0x7362;
    shl.b32 $0, low, 16;
    and.b32 $1, low, 0xffff0000;
    shl.b32 $2, high, 16;
    and.b32 $3, high, 0xffff0000;
    shr.u32 at, $8, 16;
    and.b32 size, at, 0x7777;
    prmt.b32 upper, 0x3f3f3f00, 0x40404040, size;
    prmt.b32 lower, 0xc0800000, 0xc0804000, size;
    shr.u32 sign, at, 3;
    and.b32 sign, sign, 0x1111;
    prmt.b32 sign, 0x00008000, 0, sign;
    or.b32 upper, upper, sign;
    prmt.b32 low, lower, upper, 0x5140;
    prmt.b32 high, lower, upper, 0x7362;
    shl.b32 $4, low, 16;
    and.b32 $5, low, 0xffff0000;
    shl.b32 $6, high, 16;
    and.b32 $7, high, 0xffff0000;
}""")
_FLOAT8 = tl.constexpr("""{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 two, more;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 two, low;
    cvt.rn.f16x2.e4m3x2 more, high;
    mov.b32 {a, b}, two;
    mov.b32 {c, d}, more;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}""")


@triton.jit
def _code(word, place: tl.constexpr, CODE: tl.constexpr):
    """One of a word, as float32, without the means of a GPU."""
    if CODE == 0:
        return ((word >> (8 * place)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif CODE == 1:
        return _float4((word >> (4 * place)) & 15)
    else:
        return ((word >> (4 * place)) & 15).to(tl.float32) + 16.0


@triton.jit
def _numbers(word, CODE: tl.constexpr, PTX: tl.constexpr):
    """What the codes of int32 stand for, in order, as float32: four, or eight of four bits; integers plus 16."""
    if not PTX:
        found = ()
        for place in tl.static_range(4 if CODE == 0 else 8):
            found = found + (_code(word, place, CODE),)
        return found
    elif CODE == 0:
        return tl.inline_asm_elementwise(
            _FLOAT8, "=f,=f,=f,=f,r", [word], is_pure=True, pack=1,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            _FLOAT4 if CODE == 1 else _INTEGER4, "=r,=r,=r,=r,=r,=r,=r,=r,r", [word], is_pure=True, pack=1,
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        )  # fmt: skip
        numbers = ()
        for place in tl.static_range(8):
            numbers = numbers + (found[place].to(tl.float32, bitcast=True),)
        return numbers


@triton.jit
def _columns_of(piece, CODE: tl.constexpr):
    """[CHUNKS, 4 or 8] as so many tensors: no thread needs another's."""
    chunks: tl.constexpr = piece.shape[0]
    if CODE == 0:
        even, odd = tl.split(tl.reshape(piece, [chunks, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d
    else:
        even, odd = tl.split(tl.reshape(piece, [chunks, 4, 2]))
        ae, cg = tl.split(tl.reshape(even, [chunks, 2, 2]))
        bf, dh = tl.split(tl.reshape(odd, [chunks, 2, 2]))
        a, e = tl.split(ae)
        b, f = tl.split(bf)
        c, g = tl.split(cg)
        d, h = tl.split(dh)
        return a, b, c, d, e, f, g, h


@triton.jit
def _words_at(
    codes, scales, zeros, row, line, columns, start, is_n, inner, codes_row, scales_row,
    EXPONENTS: tl.constexpr, ZEROS: tl.constexpr, RUN: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Four words of codes [CHUNKS, TILE_N] from column `start` on, and each chunk's and row's scale and zero.

    EVEN: all of them are inside.
    """
    chunk = start // RUN + tl.arange(0, CHUNKS)
    at = codes + (line * codes_row)[None, :, None] + (chunk * 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
    if EVEN:
        place = tl.load(columns + chunk * RUN)[:, None] + (row * scales_row)[None, :]
        found, scale = tl.load(at), tl.load(scales + place)
        zero = tl.load(zeros + place) if ZEROS else scale
    else:
        inside = (chunk * RUN < inner)[:, None] & is_n[None, :]
        place = tl.load(columns + chunk * RUN, mask=chunk * RUN < inner, other=0)[:, None] + (row * scales_row)[None, :]
        found, scale = tl.load(at, mask=inside[:, :, None], other=0), tl.load(scales + place, mask=inside, other=0)
        zero = tl.load(zeros + place, mask=inside, other=0) if ZEROS else scale
    even, odd = tl.split(tl.reshape(found, [CHUNKS, line.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    scale, zero = scale.to(tl.float32), zero.to(tl.float32)
    if EXPONENTS:
        scale = tl.exp2(scale - 127.0)
    return (first, second, third, fourth), scale, zero


@triton.jit
def few_rows(
    x, added, norm, out, total, bias, codes, scales, zeros, rows, columns, gate_codes, gate_scales, gate_zeros,
    gate_rows, gate_columns, eps, num_out, inner, x_row, added_row, codes_row, scales_row, gate_codes_row,
    gate_scales_row, ROWS: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr, WEIGHTED: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, CODE: tl.constexpr, EXPONENTS: tl.constexpr, ZEROS: tl.constexpr,
    PTX: tl.constexpr, RUN: tl.constexpr, TILE_N: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """x, added: [ROWS, inner]; out: [ROWS, num_out]; total: [ROWS, inner]; codes: [num_out, words of int32], with
    `codes_row` in words; the rest as `stored_linear.py` has it. RUN: columns of four words, which divide inner and
    share a scale.
    """
    width: tl.constexpr = RUN // 4
    program = tl.program_id(0)
    n = program * TILE_N + tl.arange(0, TILE_N)
    is_n = n < num_out
    line = n.to(tl.int64)
    row = tl.load(rows + n, mask=is_n, other=0)
    words, scale, zero = _words_at(
        codes, scales, zeros, row, line, columns, 0, is_n, inner, codes_row, scales_row, EXPONENTS, ZEROS, RUN, CHUNKS,
        EVEN,
    )  # fmt: skip
    if ACT != "":
        gate_row = tl.load(gate_rows + n, mask=is_n, other=0)
        gate_words, gate_scale, gate_zero = _words_at(
            gate_codes, gate_scales, gate_zeros, gate_row, line, gate_columns, 0, is_n, inner, gate_codes_row,
            gate_scales_row, EXPONENTS, ZEROS, RUN, CHUNKS, EVEN,
        )  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sums = ()
    gates = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((CHUNKS, TILE_N), dtype=tl.float32),)
        gates = gates + (tl.zeros((CHUNKS, TILE_N), dtype=tl.float32),)
        squares = squares + (tl.zeros((CHUNKS,), dtype=tl.float32),)
    for start in tl.range(0, inner, CHUNKS * RUN, num_stages=1):
        next_words, next_scale, next_zero = _words_at(
            codes, scales, zeros, row, line, columns, start + CHUNKS * RUN, is_n, inner, codes_row, scales_row,
            EXPONENTS, ZEROS, RUN, CHUNKS, False,
        )  # fmt: skip
        if ACT != "":
            gate_next_words, gate_next_scale, gate_next_zero = _words_at(
                gate_codes, gate_scales, gate_zeros, gate_row, line, gate_columns, start + CHUNKS * RUN, is_n, inner,
                gate_codes_row, gate_scales_row, EXPONENTS, ZEROS, RUN, CHUNKS, False,
            )  # fmt: skip
        new_sums = ()
        new_gates = ()
        new_squares = ()
        for index in tl.static_range(ROWS):
            part = tl.zeros((CHUNKS, TILE_N), dtype=tl.float32)
            gate_part = part
            whole = tl.zeros((CHUNKS,), dtype=tl.float32)
            square = squares[index]
            for place in tl.static_range(4):
                at_k = start + tl.arange(0, CHUNKS)[:, None] * RUN + place * width + tl.arange(0, width)[None, :]
                own, scaled = row_at(
                    x + index * x_row, added + index * added_row, total, norm, index, at_k, inner, program == 0, ADDS,
                    WEIGHTED,
                )  # fmt: skip
                if NORMS:
                    square += tl.sum(own * own, axis=1)
                if CODE == 2:
                    whole += tl.sum(scaled, axis=1)
                values = _columns_of(scaled, CODE)
                numbers = _numbers(words[place], CODE, PTX)
                for each in tl.static_range(width):
                    part += numbers[each] * values[each][:, None]
                if ACT != "":
                    numbers = _numbers(gate_words[place], CODE, PTX)
                    for each in tl.static_range(width):
                        gate_part += numbers[each] * values[each][:, None]
            if CODE == 2:
                part -= (zero + 16.0 if ZEROS else 24.0) * whole[:, None]
                if ACT != "":
                    gate_part -= (gate_zero + 16.0 if ZEROS else 24.0) * whole[:, None]
            new_sums = new_sums + (sums[index] + part * scale,)
            if ACT != "":
                new_gates = new_gates + (gates[index] + gate_part * gate_scale,)
            else:
                new_gates = new_gates + (gates[index],)
            new_squares = new_squares + (square,)
        sums, gates, squares = new_sums, new_gates, new_squares
        words, scale, zero = next_words, next_scale, next_zero
        if ACT != "":
            gate_words, gate_scale, gate_zero = gate_next_words, gate_next_scale, gate_next_zero
    for index in tl.static_range(ROWS):
        put(
            out + index * num_out, sums[index], gates[index], squares[index], bias, eps, n, num_out, inner,
            0, NORMS, ACT, BIAS,
        )  # fmt: skip
