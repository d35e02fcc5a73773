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
bfloat16, as ops one by one would; only the factor of the norm multiplies the sums. One row can be made ready for that
by the product before it (`dot_rows.Ready`): then it is only read here.

PARTS tiles of each warp are under way at any time: as soon as one is multiplied, its registers are there for the next.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.ops.kernels.decode.activations_kernel import activated
from runtime.ops.kernels.stored.operands_kernel import halves, high, in_order_of_nibbles, low, matrix, plus, times

__all__ = ["dot_rows"]


@triton.jit
def _dot(left, right, PTX: tl.constexpr):
    """In Triton's interpreter, tiles of bfloat16 have no products."""
    if PTX:
        return tl.dot(left, right)
    else:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")


@triton.jit
def _eight(
    x, added, norm, at, live, mine, ADDS: tl.constexpr, WEIGHTED: tl.constexpr, PTX: tl.constexpr, EVEN: tl.constexpr
):
    """Of eight columns a lane, pairs of what the norm is of, times its weight: [4 (t), 8 (g), WARPS, 4]. Lanes of rows
    that there are not (`mine`) have anything: what is computed of it is not put.
    """
    found = _four(x + at, live, mine, EVEN)
    if ADDS:
        found = plus(found, _four(added + at, live, mine, EVEN), PTX)
    if WEIGHTED:
        found = times(found, _four(norm + at, live, mine, EVEN), PTX)
    return found


@triton.jit
def _four(at, live, mine, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at, mask=mine)
    else:
        return tl.load(at, mask=mine & live, other=0)


@triton.jit
def _right(
    x, added, norm, live, mine, ADDS: tl.constexpr, WEIGHTED: tl.constexpr, READY: tl.constexpr, CODE: tl.constexpr,
    PTX: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows of a tile's columns, in the order of the codes: [WARPS, TILE_K, 8 (g)]. READY: one row that lies so already,
    so that no thread does anything with it but to read it.
    """
    a = _eight(x, added, norm, 0, live, mine, ADDS, WEIGHTED, PTX, EVEN)
    b = _eight(x, added, norm, 4, live, mine, ADDS, WEIGHTED, PTX, EVEN)
    if CODE == 0:
        both = tl.reshape(tl.join(halves(a, PTX), halves(b, PTX)), [4, 8, WARPS, 2, 2, 2, 2])
        # t g W w%2 p i w/2, READY: t g W p w%2 i w/2; to W w/2 w%2 t p i g
        if READY:
            return tl.reshape(tl.permute(both, [2, 6, 4, 0, 3, 5, 1]), [WARPS, 64, 8])
        else:
            return tl.reshape(tl.permute(both, [2, 6, 3, 0, 4, 5, 1]), [WARPS, 64, 8])
    else:
        c = _eight(x, added, norm, 8, live, mine, ADDS, WEIGHTED, PTX, EVEN)
        d = _eight(x, added, norm, 12, live, mine, ADDS, WEIGHTED, PTX, EVEN)
        return in_order_of_nibbles(a, b, c, d, READY, PTX, WARPS)


@triton.jit
def _words(upper, lower, part: tl.constexpr, live, EVEN: tl.constexpr):
    """Of one part the words of the upper rows, and of the lower; of columns that there are not: any if EVEN."""
    if EVEN:
        return tl.load(upper + part * 16, mask=live), tl.load(lower + part * 16, mask=live)
    else:
        inside = part < live
        return tl.load(upper + part * 16, mask=inside, other=0), tl.load(lower + part * 16, mask=inside, other=0)


@triton.jit
def _scales(
    scales, zeros, columns, row, scales_row, at, inner, ZEROS: tl.constexpr, WIDE: tl.constexpr, TILE_K: tl.constexpr
):
    """Rows' and warps' scales and zeros, [WARPS, 16], of the part whose first columns are `at`; WIDE: of two parts."""
    if WIDE:
        place = row[None, :] * scales_row + (at // (2 * TILE_K))[:, None]
        live = (at < inner)[:, None]
        scale = tl.load(scales + place, mask=live, other=0)
        return scale, tl.load(zeros + place, mask=live, other=0).to(tl.int32) if ZEROS else scale
    else:
        column = tl.load(columns + at, mask=at < inner, other=0)
        place = row[None, :] * scales_row + column[:, None]
        scale = tl.load(scales + place)
        return scale, tl.load(zeros + place) if ZEROS else scale


@triton.jit
def _scaled(
    sums, whole, by, part: tl.constexpr, CODE: tl.constexpr, EXPONENTS: tl.constexpr, ZEROS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sums [WARPS, 16, 8] of codes times x; whole: of x. Integers are 128 and the code."""
    if WIDE:
        # 1: of float16, 2: of bfloat16
        two = by[part // 2 * 2]
        if WIDE == 1:
            scale = (two >> (16 * (part % 2))).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            scale = ((two >> (16 * (part % 2))) << 16).to(tl.float32, bitcast=True)
        zero = ((by[part // 2 * 2 + 1] >> (8 * (part % 2))) & 255).to(tl.float32)
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
def _put_for_norm(
    out, y, bias, norm, ready, squares, program, n, num_out, BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    NIBBLES: tl.constexpr,
):  # fmt: skip
    """The one row, and what a product behind a norm needs of it: see `dot_rows.Ready`."""
    live = n < num_out
    one = tl.sum(tl.where(tl.arange(0, 8)[None, :] == 0, y, 0.0), 1)
    if BIAS:
        one += tl.load(bias + n, mask=live, other=0.0).to(tl.float32)
    rounded = one.to(out.dtype.element_ty)
    tl.store(out + n, rounded, mask=live)
    one = tl.where(live, rounded.to(tl.float32), 0.0)
    tl.store(squares + program, tl.sum(one * one, 0))
    if WEIGHTED:
        one *= tl.load(norm + n, mask=live, other=0.0).to(tl.float32)
    # see `dot_rows.Ready`
    if NIBBLES:
        place = n - n % 8 + n % 2 * 4 + n // 2 % 2 * 2 + n // 4 % 2
    else:
        place = n - n % 8 + n // 2 % 2 * 4 + n // 4 % 2 * 2 + n % 2
    tl.store(ready + place, one.to(out.dtype.element_ty), mask=live)


@triton.jit
def dot_rows(
    x, added, norm, out, total, bias, ready, squares, codes, scales, zeros, rows, columns, gate_codes, gate_scales,
    gate_zeros, gate_rows, gate_columns, eps, num_out, inner, x_row, added_row, codes_row, scales_row, gate_codes_row,
    gate_scales_row, ROWS: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr, WEIGHTED: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, CODE: tl.constexpr, EXPONENTS: tl.constexpr, ZEROS: tl.constexpr,
    PTX: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr, SHARE: tl.constexpr, SQUARES: tl.constexpr,
    WIDE: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, READY: tl.constexpr, FOR_NORM: tl.constexpr,
):  # fmt: skip
    """As `few_rows_kernel.few_rows` has them: x, added [ROWS, inner], total as int32 of two numbers; out
    [ROWS, num_out]; codes [num_out, words of int32]. PARTS: tiles of a warp, of columns one after the other. EVEN: all
    warps have something to do, always; inner is a multiple of TILE_K in any case. WIDE: scales and zeros are read two
    by two, and lie in the order of the columns.

    READY: x and squares are those of a `dot_rows.Ready`. FOR_NORM: ready and squares are written, for a norm of `norm`;
    1: for float8, 2: for int4.
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
    weighs: tl.constexpr = NORMS and WEIGHTED
    four, of_warp = tl.arange(0, 4)[None, None, None, :], warp[None, None, :, None]
    quarter = tl.arange(0, 4)[:, None, None, None]
    word = quarter * 4 + of_warp * (span // per_word) + four
    upper_at, lower_at = codes + (upper * codes_row + word), codes + (lower * codes_row + word)
    # how many parts there are for each warp
    live = tl.full((1, 1, WARPS, 1), 1, tl.int1) if EVEN else ((inner - warp * span) // tile_k)[None, None, :, None]
    words = ()
    gate_words = ()
    gate_upper_at, gate_lower_at = upper_at, lower_at
    if ACT != "":
        gate_upper_at = gate_codes + (upper * gate_codes_row + word)
        gate_lower_at = gate_codes + (lower * gate_codes_row + word)
    for part in tl.static_range(PARTS):
        words = words + _words(upper_at, lower_at, part, live, EVEN)
        if ACT != "":
            gate_words = gate_words + _words(gate_upper_at, gate_lower_at, part, live, EVEN)
    row = tl.load(rows + tl.minimum(n, num_out - 1))
    gate_row = tl.load(gate_rows + tl.minimum(n, num_out - 1)) if ACT != "" else row
    by = ()
    gate_by = ()
    for part in tl.static_range(0, PARTS, 2 if WIDE else 1):
        of_part = warp * span + part * tile_k
        by = by + _scales(scales, zeros, columns, row, scales_row, of_part, inner, ZEROS, WIDE, tile_k)
        if ACT != "":
            gate_by = gate_by + _scales(
                gate_scales, gate_zeros, gate_columns, gate_row, gate_scales_row, of_part, inner, ZEROS, WIDE, tile_k
            )
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.arange(0, 8)
    pairs = inner // 2
    square = tl.zeros((8,), dtype=tl.float32)
    if READY:
        part_squares = tl.zeros((SQUARES,), dtype=tl.float32)
        for start in range(0, tl.cdiv(inner, 16), SQUARES):
            k = start + tl.arange(0, SQUARES)
            part_squares += tl.load(squares + k, mask=k < tl.cdiv(inner, 16), other=0.0)
        square += tl.sum(part_squares, 0)
    elif NORMS:
        for index in tl.static_range(ROWS):
            of_row = tl.zeros((SQUARES,), dtype=tl.float32)
            for start in range(0, pairs, SQUARES):
                k = start + tl.arange(0, SQUARES)
                own = tl.load(x + index * x_row + k, mask=k < pairs, other=0)
                if ADDS:
                    own = plus(own, tl.load(added + index * added_row + k, mask=k < pairs, other=0), PTX)
                of_row += low(own) * low(own) + high(own) * high(own)
            square += tl.where(m == index, tl.sum(of_row, 0), 0.0)
    if ADDS:
        # a part of the total for each program
        k = program * SHARE + tl.arange(0, SHARE)
        for index in tl.static_range(ROWS):
            one = tl.load(x + index * x_row + k, mask=k < pairs, other=0)
            two = tl.load(added + index * added_row + k, mask=k < pairs, other=0)
            tl.store(total + index * pairs + k, plus(one, two, PTX), mask=k < pairs)
    at_row = tl.minimum(m, ROWS - 1)[None, :, None, None]
    mine = (m < ROWS)[None, :, None, None]
    pair = quarter * (lane // 2) + of_warp * (span // 2) + four
    x_at, added_at = x + (at_row * x_row + pair), added + (at_row * added_row + pair)
    norm_at = norm + (0 * at_row + pair)
    sums = tl.zeros((WARPS, 16, 8), dtype=tl.float32)
    gates = tl.zeros((WARPS, 16, 8), dtype=tl.float32)
    ones = tl.full((WARPS, 16, tile_k), 1.0, dtype=tl.bfloat16 if PTX else tl.float32)
    for start in tl.range(0, inner, step, num_stages=1):
        ahead = (start + step) // per_word
        left = start + step < inner if EVEN else ((inner - start - step - warp * span) // tile_k)[None, None, :, None]
        next_words = ()
        next_by = ()
        next_gate_words = ()
        next_gate_by = ()
        for part in tl.static_range(PARTS):
            is_column = (start + part * tile_k + warp * span < inner)[None, None, :, None]
            at = start // 2 + part * (tile_k // 2)
            right = _right(
                x_at + at, added_at + at, norm_at + at, is_column, mine, ADDS, weighs, READY, CODE, PTX, WARPS, EVEN
            )
            whole = _dot(ones, right, PTX) if CODE == 2 else right
            part_sums = _dot(matrix(words[2 * part], words[2 * part + 1], CODE, PTX, WARPS), right, PTX)
            sums += _scaled(part_sums, whole, by, part, CODE, EXPONENTS, ZEROS, WIDE)
            if ACT != "":
                part_sums = _dot(matrix(gate_words[2 * part], gate_words[2 * part + 1], CODE, PTX, WARPS), right, PTX)
                gates += _scaled(part_sums, whole, gate_by, part, CODE, EXPONENTS, ZEROS, WIDE)
            # where these words were, the next: so the memory never has nothing to bring
            next_words = next_words + _words(upper_at + ahead, lower_at + ahead, part, left, EVEN)
            if ACT != "":
                next_gate_words = next_gate_words + _words(
                    gate_upper_at + ahead, gate_lower_at + ahead, part, left, EVEN
                )
            if not WIDE or part % 2 == 1:
                next_at = start + step + warp * span + (part - 1 if WIDE else part) * tile_k
                next_by = next_by + _scales(
                    scales, zeros, columns, row, scales_row, next_at, inner, ZEROS, WIDE, tile_k
                )
                if ACT != "":
                    next_gate_by = next_gate_by + _scales(
                        gate_scales, gate_zeros, gate_columns, gate_row, gate_scales_row, next_at, inner, ZEROS, WIDE,
                        tile_k,
                    )  # fmt: skip
        words, gate_words, by, gate_by = next_words, next_gate_words, next_by, next_gate_by
    y = tl.sum(sums, 0)
    factor = tl.rsqrt(square / inner + eps)[None, :]
    if NORMS:
        y *= factor
    if ACT != "":
        other = tl.sum(gates, 0)
        if NORMS:
            other *= factor
        y *= activated(other, ACT)
    if FOR_NORM:
        _put_for_norm(out, y, bias, norm, ready, squares, program, n, num_out, BIAS, WEIGHTED, FOR_NORM == 2)
    else:
        _put(out, y, bias, n, num_out, ROWS, BIAS)
