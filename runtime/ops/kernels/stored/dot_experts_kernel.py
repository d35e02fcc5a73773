"""Products of single rows with matrices of float4, of one expert each, by tensor cores: see `dot_rows_kernel.py`.

    x [T, K]   codes [E, N, K/2]   scales [R, G], powers of two   ->   [T, N]

A lane has 32 columns of a row of the matrix, which share a scale. So numbers are scaled one by one, which is exact. A
code's sign, and the three bits of its size, are those of a bfloat16 that is 2^126 times smaller, and it is multiplied
with 2^126 times the scale: scales are at most 2 (an exponent of 128). Columns are in the order of int4's. All columns
of the other operand are the one row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.ops.kernels.stored.operands_kernel import halves, in_order_of_nibbles
from runtime.ops.kernels.stored.stored_kernel import _float4

__all__ = ["dot_experts"]

# nibbles q and 4 + q of a word: bits 4 q + 3 to bits 15, bits 4 q + 2 and below to bits 8 and below; then times $5
_SCALED = tl.constexpr("""{
    .reg .b32 sign, size;
    shl.b32 size, $4, 6;
    and.b32 size, size, 0x01c001c0;
    shl.b32 sign, $4, 12;
    lop3.b32 size, sign, 0x80008000, size, 0xea;
    mul.rn.bf16x2 $0, size, $5;
    shl.b32 size, $4, 2;
    and.b32 size, size, 0x01c001c0;
    shl.b32 sign, $4, 8;
    lop3.b32 size, sign, 0x80008000, size, 0xea;
    mul.rn.bf16x2 $1, size, $5;
    shr.u32 size, $4, 2;
    and.b32 size, size, 0x01c001c0;
    shl.b32 sign, $4, 4;
    lop3.b32 size, sign, 0x80008000, size, 0xea;
    mul.rn.bf16x2 $2, size, $5;
    shr.u32 size, $4, 6;
    and.b32 size, size, 0x01c001c0;
    lop3.b32 size, $4, 0x80008000, size, 0xea;
    mul.rn.bf16x2 $3, size, $5;
}""")


@triton.jit
def _one(words, scale, place: tl.constexpr):
    return _float4((words >> (4 * place)) & 15) * scale


@triton.jit
def _two(words, scale, q: tl.constexpr):
    return tl.join(_one(words, scale, q), _one(words, scale, q + 4))


@triton.jit
def _numbers(words, scale, PTX: tl.constexpr):
    """Words [4 (t), 8 (g), WARPS, 4] as numbers, [.., 4, i, q % 2, q / 2]; scale: exponents [4, 8, WARPS, 1]."""
    exponent = scale.to(tl.int32)
    if PTX:
        bits = (exponent + 126) << 7
        a, b, c, d = tl.inline_asm_elementwise(
            _SCALED, "=r,=r,=r,=r,r,r", [words, tl.broadcast_to(bits | (bits << 16), words.shape)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        return tl.join(tl.join(halves(a, PTX), halves(b, PTX)), tl.join(halves(c, PTX), halves(d, PTX)))
    else:
        factor = tl.exp2(exponent.to(tl.float32) - 127.0)
        return tl.join(
            tl.join(_two(words, factor, 0), _two(words, factor, 1)),
            tl.join(_two(words, factor, 2), _two(words, factor, 3)),
        )


@triton.jit
def _tile(upper, lower, upper_scale, lower_scale, PTX: tl.constexpr, WARPS: tl.constexpr):
    both = tl.join(_numbers(upper, upper_scale, PTX), _numbers(lower, lower_scale, PTX))
    # t g W w i q%2 q/2 h: W h g w q/2 t q%2 i
    return tl.reshape(tl.permute(both, [2, 7, 1, 3, 6, 0, 5, 4]), [WARPS, 16, 128])


@triton.jit
def _row(x, live, PTX: tl.constexpr, WARPS: tl.constexpr):
    """Pairs of a row at x [4 (t), 8 (g), WARPS, 4], and of three times as many behind them, [WARPS, 128, 8 (g)]."""
    a, b = tl.load(x, mask=live, other=0), tl.load(x + 4, mask=live, other=0)
    c, d = tl.load(x + 8, mask=live, other=0), tl.load(x + 12, mask=live, other=0)
    return in_order_of_nibbles(a, b, c, d, False, PTX, WARPS)


@triton.jit
def _codes(upper, lower, scales, upper_row, lower_row, columns, at, inner, PARTS: tl.constexpr):
    """Of each part, words of upper and of lower rows, and their scales. at: each lane's first column."""
    found = ()
    for part in tl.static_range(PARTS):
        live = at + part * 128 < inner
        column = tl.load(columns + (at + part * 128), mask=live, other=0)
        found = found + (
            tl.load(upper + part * 16, mask=live, other=0), tl.load(lower + part * 16, mask=live, other=0),
            tl.load(scales + (upper_row + column), mask=live, other=0),
            tl.load(scales + (lower_row + column), mask=live, other=0),
        )  # fmt: skip
    return found


@triton.jit
def dot_experts(
    x, codes, scales, rows, columns, bias, counts, out, num_out, inner, num_experts, x_row, codes_row, scales_row,
    BIAS: tl.constexpr, EXPERTS: tl.constexpr, PTX: tl.constexpr, WARPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """x: pairs of bfloat16 as int32, which `x_row` counts; codes: words of int32. EXPERTS: their number, padded, or 0.

    inner is a multiple of 32, and columns share their scale from any multiple of 32 on.
    """
    span: tl.constexpr = 128 * PARTS
    step: tl.constexpr = span * WARPS
    token = tl.program_id(1)
    first = tl.program_id(0) * 16
    own = 0
    if EXPERTS:
        expert = tl.arange(0, EXPERTS)
        until = tl.cumsum(tl.load(counts + expert, mask=expert < num_experts, other=0).to(tl.int32), 0)
        own = tl.sum(((until <= token) & (expert < num_experts)).to(tl.int32))
        if own >= num_experts:
            return
    upper = tl.minimum(first + tl.arange(0, 8), num_out - 1)[None, :, None, None] + own.to(tl.int64) * num_out
    lower = tl.minimum(first + 8 + tl.arange(0, 8), num_out - 1)[None, :, None, None] + own.to(tl.int64) * num_out
    lane = tl.arange(0, 4)[:, None, None, None] * 32 + tl.arange(0, WARPS)[None, None, :, None] * span
    word = lane // 8 + tl.arange(0, 4)[None, None, None, :]
    upper_at, lower_at = codes + (upper * codes_row + word), codes + (lower * codes_row + word)
    upper_row, lower_row = tl.load(rows + upper) * scales_row, tl.load(rows + lower) * scales_row
    x_at = x + token.to(tl.int64) * x_row + (lane // 2 + tl.arange(0, 4)[None, None, None, :]) + 0 * upper
    given = _codes(upper_at, lower_at, scales, upper_row, lower_row, columns, lane, inner, PARTS)
    sums = tl.zeros((WARPS, 16, 8), dtype=tl.float32)
    for start in tl.range(0, inner, step, num_stages=1):
        ahead = start + step
        following = _codes(
            upper_at + ahead // 8, lower_at + ahead // 8, scales, upper_row, lower_row, columns, lane + ahead, inner,
            PARTS,
        )  # fmt: skip
        for part in tl.static_range(PARTS):
            right = _row(x_at + start // 2 + part * 64, lane + (start + part * 128) < inner, PTX, WARPS)
            left = _tile(given[4 * part], given[4 * part + 1], given[4 * part + 2], given[4 * part + 3], PTX, WARPS)
            if PTX:
                sums = tl.dot(left, right, sums)
            else:
                sums += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
        given = following
    n = first + tl.arange(0, 16)
    y = tl.max(tl.sum(sums, 0), 1)  # all are the same
    if BIAS:
        y += tl.load(bias + own.to(tl.int64) * num_out + n, mask=n < num_out, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * num_out + n, y.to(out.dtype.element_ty), mask=n < num_out)
