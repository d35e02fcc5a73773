"""The product of up to eight rows with a matrix of codes, and what stands around it, by tensor cores.

    x [R, K]   codes [N, K] or [N, K/2]   ->   [R, N]

A product of one row is bound by the memory that the codes take, if a code costs few instructions: so codes become
bfloat16, two an instruction where they can, and tensor cores multiply and add. TILE_N = 16 rows of the matrix are the
rows of a tile, up to eight rows of x its columns (`mma.m16n8k16`), and each warp of a program takes other columns.

Codes go from memory to tensor cores without another thread's help. A warp's lane has 16 bytes of codes of one row, and
of the row eight below: lane = 4 g + t has row g and the t-th of four pieces of a row. Which k of a tile a column is
does not matter for a sum, so x is read in the order that the codes have:

    float8   16 columns a lane: word w, its bytes 2 p + i      k = 16 w + 4 t + 2 p + i
    int4     32 columns a lane: word w, its nibbles q + 4 i    k = 32 w + 16 (q / 2) + 4 t + 2 (q % 2) + i

Of integers of four bits, 128 and the code is one bfloat16; 128 and the zero times the sum of x are subtracted from the
sum, in float32. Columns of a tile share a scale, which multiplies their sum. x is added, normalised and weighted in
bfloat16, as ops one by one would; only the factor of the norm multiplies the sums. The squares are summed by tensor
cores too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.ops.kernels.decode.activations_kernel import activated

__all__ = ["dot_rows", "halves", "in_order_of_nibbles"]

_ADD = tl.constexpr("add.rn.bf16x2 $0, $1, $2;")
_MULTIPLY = tl.constexpr("mul.rn.bf16x2 $0, $1, $2;")
_SPLIT = tl.constexpr("mov.b32 {$0, $1}, $2;")
# four codes as float16, then as float32, whose upper halves are bfloat16: exactly, the mantissa has three bits
_FLOAT8 = tl.constexpr("""{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 two, more;
    .reg .f32 fa, fb, fc, fd;
    .reg .b32 x, y, z, w;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 two, low;
    cvt.rn.f16x2.e4m3x2 more, high;
    mov.b32 {a, b}, two;
    mov.b32 {c, d}, more;
    cvt.f32.f16 fa, a;
    cvt.f32.f16 fb, b;
    cvt.f32.f16 fc, c;
    cvt.f32.f16 fd, d;
    mov.b32 x, fa;
    mov.b32 y, fb;
    mov.b32 z, fc;
    mov.b32 w, fd;
    prmt.b32 $0, x, y, 0x7632;
    prmt.b32 $1, z, w, 0x7632;
}""")
# nibbles i and 4 + i into the lowest four bits of two bfloat16 of 128
_INTEGER4 = tl.constexpr("""{
    .reg .b32 next;
    lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
    shr.u32 next, $4, 4;
    lop3.b32 $1, next, 0x000f000f, 0x43004300, 0xea;
    shr.u32 next, $4, 8;
    lop3.b32 $2, next, 0x000f000f, 0x43004300, 0xea;
    shr.u32 next, $4, 12;
    lop3.b32 $3, next, 0x000f000f, 0x43004300, 0xea;
}""")


@triton.jit
def _pair(both):
    """int32 as its two halves of bfloat16, [.., 2]."""
    low, high = tl.inline_asm_elementwise(
        _SPLIT, "=h,=h,r", [both], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
    )
    return tl.join(low, high)


@triton.jit
def _numbers(words, CODE: tl.constexpr, PTX: tl.constexpr):
    """What words [.., 4] stand for, [.., 4, i, p] of float8, [.., 4, i, q % 2, q / 2] of int4: see the docstring."""
    if CODE == 0:
        if PTX:
            first, second = tl.inline_asm_elementwise(
                _FLOAT8, "=r,=r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
            )
            return tl.join(_pair(first), _pair(second))
        else:
            return tl.join(tl.join(_float8(words, 0), _float8(words, 1)), tl.join(_float8(words, 2), _float8(words, 3)))
    else:
        if PTX:
            a, b, c, d = tl.inline_asm_elementwise(
                _INTEGER4, "=r,=r,=r,=r,r", [words], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True,
                pack=1,
            )  # fmt: skip
            return tl.join(tl.join(_pair(a), _pair(b)), tl.join(_pair(c), _pair(d)))
        else:
            return tl.join(
                tl.join(_integer4(words, 0), _integer4(words, 1)), tl.join(_integer4(words, 2), _integer4(words, 3))
            )


@triton.jit
def _float8(words, place: tl.constexpr):
    return ((words >> (8 * place)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def _integer4(words, q: tl.constexpr):
    low, high = (words >> (4 * q)) & 15, (words >> (4 * q + 16)) & 15
    return tl.join(low.to(tl.float32) + 128.0, high.to(tl.float32) + 128.0)


@triton.jit
def _matrix(upper, lower, CODE: tl.constexpr, PTX: tl.constexpr, WARPS: tl.constexpr):
    """Words [4 (t), 8 (g), WARPS, 4] of rows g, and of rows 8 + g, as numbers [WARPS, 16, TILE_K]."""
    both = tl.join(_numbers(upper, CODE, PTX), _numbers(lower, CODE, PTX))
    if CODE == 0:
        # t g W w i p h: W h g w t p i
        return tl.reshape(tl.permute(both, [2, 6, 1, 3, 0, 5, 4]), [WARPS, 16, 64])
    else:
        # t g W w i q%2 q/2 h: W h g w q/2 t q%2 i
        return tl.reshape(tl.permute(both, [2, 7, 1, 3, 6, 0, 5, 4]), [WARPS, 16, 128])


@triton.jit
def _low(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pair):
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def halves(pair, PTX: tl.constexpr):
    if PTX:
        return _pair(pair)
    else:
        return tl.join(_low(pair), _high(pair))


@triton.jit
def _rounded(low, high):
    """Two float32 as int32 of two bfloat16, without the means of a GPU: to the nearest, to even between two."""
    low, high = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    low += 32767 + ((low >> 16) & 1)
    high += 32767 + ((high >> 16) & 1)
    return ((low >> 16) & 65535) | (high & -65536)


@triton.jit
def _plus(x, y, PTX: tl.constexpr):
    """Of pairs of bfloat16."""
    if PTX:
        return tl.inline_asm_elementwise(_ADD, "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return _rounded(_low(x) + _low(y), _high(x) + _high(y))


@triton.jit
def _times(x, y, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(_MULTIPLY, "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return _rounded(_low(x) * _low(y), _high(x) * _high(y))


@triton.jit
def _dot(left, right, PTX: tl.constexpr):
    """In Triton's interpreter, tiles of bfloat16 have no products."""
    if PTX:
        return tl.dot(left, right)
    else:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")


@triton.jit
def _eight(x, added, norm, at, live, ADDS: tl.constexpr, WEIGHTED: tl.constexpr, PTX: tl.constexpr, EVEN: tl.constexpr):
    """Of eight columns a lane, pairs of what the norm is of, times its weight: [4 (t), 8 (g), WARPS, 4]."""
    found = tl.load(x + at, mask=live | EVEN, other=0)
    if ADDS:
        found = _plus(found, tl.load(added + at, mask=live | EVEN, other=0), PTX)
    if WEIGHTED:
        found = _times(found, tl.load(norm + at, mask=live | EVEN, other=0), PTX)
    return found


@triton.jit
def in_order_of_nibbles(a, b, c, d, PTX: tl.constexpr, WARPS: tl.constexpr):
    """Pairs of four times eight columns, [4 (t), 8 (g), WARPS, 4] each, as [WARPS, 128, 8 (g)] of int4's tile."""
    upper, lower = tl.join(halves(a, PTX), halves(b, PTX)), tl.join(halves(c, PTX), halves(d, PTX))
    # t g W i q/2 q%2 w%2 w/2: W w/2 w%2 q/2 t q%2 i g
    both = tl.reshape(tl.join(upper, lower), [4, 8, WARPS, 2, 2, 2, 2, 2])
    return tl.reshape(tl.permute(both, [2, 7, 6, 4, 0, 5, 3, 1]), [WARPS, 128, 8])


@triton.jit
def _right(
    x, added, norm, live, ADDS: tl.constexpr, WEIGHTED: tl.constexpr, CODE: tl.constexpr, PTX: tl.constexpr,
    WARPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows of a tile's columns, in the order of the codes: [WARPS, TILE_K, 8 (g)]."""
    a = _eight(x, added, norm, 0, live, ADDS, WEIGHTED, PTX, EVEN)
    b = _eight(x, added, norm, 4, live, ADDS, WEIGHTED, PTX, EVEN)
    if CODE == 0:
        # t g W w%2 p i w/2: W w/2 w%2 t p i g
        both = tl.reshape(tl.join(halves(a, PTX), halves(b, PTX)), [4, 8, WARPS, 2, 2, 2, 2])
        return tl.reshape(tl.permute(both, [2, 6, 3, 0, 4, 5, 1]), [WARPS, 64, 8])
    else:
        c = _eight(x, added, norm, 8, live, ADDS, WEIGHTED, PTX, EVEN)
        d = _eight(x, added, norm, 12, live, ADDS, WEIGHTED, PTX, EVEN)
        return in_order_of_nibbles(a, b, c, d, PTX, WARPS)


@triton.jit
def _words(upper, lower, live, PARTS: tl.constexpr, EVEN: tl.constexpr):
    """Of each part the words of the upper rows, and of the lower; of columns that there are not: any if EVEN."""
    found = ()
    for part in tl.static_range(PARTS):
        if EVEN:
            found = found + (tl.load(upper + part * 16, mask=live), tl.load(lower + part * 16, mask=live))
        else:
            inside = part < live
            found = found + (
                tl.load(upper + part * 16, mask=inside, other=0), tl.load(lower + part * 16, mask=inside, other=0),
            )  # fmt: skip
    return found


@triton.jit
def _scales(
    scales, zeros, columns, row, scales_row, at, inner, ZEROS: tl.constexpr, WIDE: tl.constexpr, TILE_K: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Of each part, rows' and warps' scales and zeros, [WARPS, 16]. at: warps' first columns. WIDE: of two at once."""
    found = ()
    if WIDE:
        place = row[None, :] * scales_row + (at // (2 * TILE_K))[:, None]
        live = (at < inner)[:, None]
        scale = tl.load(scales + place, mask=live, other=0)
        found = found + (scale, tl.load(zeros + place, mask=live, other=0).to(tl.int32) if ZEROS else scale)
    else:
        for part in tl.static_range(PARTS):
            column = tl.load(columns + at + part * TILE_K, mask=at + part * TILE_K < inner, other=0)
            place = row[None, :] * scales_row + column[:, None]
            scale = tl.load(scales + place)
            found = found + (scale, tl.load(zeros + place) if ZEROS else scale)
    return found


@triton.jit
def _scaled(
    sums, whole, by, part: tl.constexpr, CODE: tl.constexpr, EXPONENTS: tl.constexpr, ZEROS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sums [WARPS, 16, 8] of codes times x; whole: of x. Integers are 128 and the code."""
    if WIDE:
        # 1: of float16, 2: of bfloat16
        if WIDE == 1:
            scale = (by[0] >> (16 * part)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            scale = ((by[0] >> (16 * part)) << 16).to(tl.float32, bitcast=True)
        zero = ((by[1] >> (8 * part)) & 255).to(tl.float32)
    else:
        scale, zero = by[2 * part].to(tl.float32), by[2 * part + 1].to(tl.float32)
    if CODE == 2:
        sums -= whole * (zero[:, :, None] + 128.0 if ZEROS else 136.0)
    if EXPONENTS:
        scale = tl.exp2(scale - 127.0)
    return sums * scale[:, :, None]


@triton.jit
def _put(out, y, bias, n, num_out, ROWS: tl.constexpr, BIAS: tl.constexpr):
    m = tl.arange(0, 8)
    if BIAS:
        y += tl.load(bias + n, mask=n < num_out, other=0.0).to(tl.float32)[:, None]
    inside = (n < num_out)[:, None] & (m < ROWS)[None, :]
    tl.store(out + (m[None, :] * num_out + n[:, None]), y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dot_rows(
    x, added, norm, out, total, bias, codes, scales, zeros, rows, columns, gate_codes, gate_scales, gate_zeros,
    gate_rows, gate_columns, eps, num_out, inner, x_row, added_row, codes_row, scales_row, gate_codes_row,
    gate_scales_row, ROWS: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr, WEIGHTED: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, CODE: tl.constexpr, EXPONENTS: tl.constexpr, ZEROS: tl.constexpr,
    PTX: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, SHARE: tl.constexpr, SQUARES: tl.constexpr,
    WIDE: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As `few_rows_kernel.few_rows` has them: x, added [ROWS, inner]; out [ROWS, num_out]; total [ROWS, inner]; codes
    [num_out, words of int32]. PARTS: tiles of a warp at a time, of columns one after the other. EVEN: all warps have
    something to do, always; inner is a multiple of TILE_K in any case. WIDE: scales and zeros are read two by two, and
    lie in the order of the columns.
    """
    tile_k: tl.constexpr = 64 if CODE == 0 else 128
    lane: tl.constexpr = tile_k // 4
    span: tl.constexpr = tile_k * PARTS
    step: tl.constexpr = span * WARPS
    per_word: tl.constexpr = 4 if CODE == 0 else 8
    program = tl.program_id(0)
    n = program * 16 + tl.arange(0, 16)
    upper_n = program * 16 + tl.arange(0, 8)
    upper = tl.minimum(upper_n, num_out - 1).to(tl.int64)[None, :, None, None]
    lower = tl.minimum(upper_n + 8, num_out - 1).to(tl.int64)[None, :, None, None]
    warp = tl.arange(0, WARPS)
    four, of_warp = tl.arange(0, 4)[None, None, None, :], warp[None, None, :, None]
    quarter = tl.arange(0, 4)[:, None, None, None]
    word = quarter * 4 + of_warp * (span // per_word) + four
    upper_at, lower_at = codes + (upper * codes_row + word), codes + (lower * codes_row + word)
    # how many parts there are for each warp
    live = tl.full((1, 1, WARPS, 1), 1, tl.int1) if EVEN else ((inner - warp * span) // tile_k)[None, None, :, None]
    words = _words(upper_at, lower_at, live, PARTS, EVEN)
    row = tl.load(rows + tl.minimum(n, num_out - 1))
    by = _scales(scales, zeros, columns, row, scales_row, warp * span, inner, ZEROS, WIDE, tile_k, PARTS)
    gate_words = ()
    gate_by = ()
    if ACT != "":
        gate_upper_at = gate_codes + (upper * gate_codes_row + word)
        gate_lower_at = gate_codes + (lower * gate_codes_row + word)
        gate_words = _words(gate_upper_at, gate_lower_at, live, PARTS, EVEN)
        gate_row = tl.load(gate_rows + tl.minimum(n, num_out - 1))
        gate_by = _scales(
            gate_scales, gate_zeros, gate_columns, gate_row, gate_scales_row, warp * span, inner, ZEROS, WIDE, tile_k,
            PARTS,
        )  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.arange(0, 8)
    pairs = inner // 2
    squares = tl.zeros((8,), dtype=tl.float32)
    if NORMS:
        for each in tl.static_range(ROWS):
            square = tl.zeros((SQUARES,), dtype=tl.float32)
            for start in range(0, pairs, SQUARES):
                k = start + tl.arange(0, SQUARES)
                own = tl.load(x + each * x_row + k, mask=k < pairs, other=0)
                if ADDS:
                    own = _plus(own, tl.load(added + each * added_row + k, mask=k < pairs, other=0), PTX)
                square += _low(own) * _low(own) + _high(own) * _high(own)
            squares += tl.where(m == each, tl.sum(square, 0), 0.0)
    if ADDS:
        # a part of the total for each program
        k = program * SHARE + tl.arange(0, SHARE)
        for each in tl.static_range(ROWS):
            one = tl.load(x + each * x_row + k, mask=k < pairs, other=0)
            two = tl.load(added + each * added_row + k, mask=k < pairs, other=0)
            tl.store(total + each * pairs + k, _plus(one, two, PTX), mask=k < pairs)
    at_row = tl.minimum(tl.arange(0, 8), ROWS - 1)[None, :, None, None]
    pair = quarter * (lane // 2) + of_warp * (span // 2) + four
    x_at, added_at = x + (at_row * x_row + pair), added + (at_row * added_row + pair)
    norm_at = norm + (0 * at_row + pair)
    sums = tl.zeros((WARPS, 16, 8), dtype=tl.float32)
    gates = tl.zeros((WARPS, 16, 8), dtype=tl.float32)
    ones = tl.full((WARPS, 16, tile_k), 1.0, dtype=tl.bfloat16 if PTX else tl.float32)
    for start in tl.range(0, inner, step, num_stages=1):
        ahead = (start + step) // per_word
        left = start + step < inner if EVEN else ((inner - start - step - warp * span) // tile_k)[None, None, :, None]
        next_words = _words(upper_at + ahead, lower_at + ahead, left, PARTS, EVEN)
        next_at = start + step + warp * span
        next_by = _scales(scales, zeros, columns, row, scales_row, next_at, inner, ZEROS, WIDE, tile_k, PARTS)
        next_gate_words = ()
        next_gate_by = ()
        if ACT != "":
            next_gate_by = _scales(
                gate_scales, gate_zeros, gate_columns, gate_row, gate_scales_row, next_at, inner, ZEROS, WIDE, tile_k,
                PARTS,
            )  # fmt: skip
            next_gate_words = _words(gate_upper_at + ahead, gate_lower_at + ahead, left, PARTS, EVEN)
        for part in tl.static_range(PARTS):
            is_column = (start + part * tile_k + warp * span < inner)[None, None, :, None]
            at = start // 2
            right = _right(
                x_at + at + part * (tile_k // 2), added_at + at + part * (tile_k // 2),
                norm_at + at + part * (tile_k // 2), is_column, ADDS, WEIGHTED, CODE, PTX, WARPS, EVEN,
            )  # fmt: skip
            whole = _dot(ones, right, PTX) if CODE == 2 else right
            part_sums = _dot(_matrix(words[2 * part], words[2 * part + 1], CODE, PTX, WARPS), right, PTX)
            sums += _scaled(part_sums, whole, by, part, CODE, EXPONENTS, ZEROS, WIDE)
            if ACT != "":
                part_sums = _dot(_matrix(gate_words[2 * part], gate_words[2 * part + 1], CODE, PTX, WARPS), right, PTX)
                gates += _scaled(part_sums, whole, gate_by, part, CODE, EXPONENTS, ZEROS, WIDE)
        words, gate_words, by, gate_by = next_words, next_gate_words, next_by, next_gate_by
    y = tl.sum(sums, 0)
    factor = tl.rsqrt(squares / inner + eps)[None, :]
    if NORMS:
        y *= factor
    if ACT != "":
        other = tl.sum(gates, 0)
        if NORMS:
            other *= factor
        y *= activated(other, ACT)
    _put(out, y, bias, n, num_out, ROWS, BIAS)
