"""Codes, and pairs of bfloat16 in an int32, as operands of tensor cores: in registers, without another thread's help.

matrix                 words of codes as a tile of the left operand; in which order: `dot_rows_kernel.py`
halves                 pairs of numbers of the right operand; in_order_of_nibbles: of a whole tile beside int4's
low, high              one of a pair, as float32
plus, times            of pairs, rounded as bfloat16
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["halves", "high", "in_order_of_nibbles", "low", "matrix", "plus", "times"]

_ADD = tl.constexpr("add.rn.bf16x2 $0, $1, $2;")
_MULTIPLY = tl.constexpr("mul.rn.bf16x2 $0, $1, $2;")
# four codes as float16, then as float32, whose upper halves are bfloat16: exactly, the mantissa has three bits
_FLOAT8 = tl.constexpr("""{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 two, more;
    .reg .f32 fa, fb, fc, fd;
    .reg .b32 x, y, z, w;
    mov.b32 {low, high}, $4;
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
    mov.b32 {low, $0}, x;
    mov.b32 {low, $1}, y;
    mov.b32 {low, $2}, z;
    mov.b32 {low, $3}, w;
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
    """int32 as its two halves of bfloat16, [.., 2]. Without PTX: so the compiler sees that both are one register."""
    first, second = both.to(tl.int16), (both >> 16).to(tl.int16)
    return tl.join(first, second).to(tl.bfloat16, bitcast=True)


@triton.jit
def _numbers(words, CODE: tl.constexpr, PTX: tl.constexpr):
    """What words [.., 4] stand for, [.., 4, i, p] of float8, [.., 4, i, q % 2, q / 2] of int4: `dot_rows_kernel.py`."""
    if CODE == 0:
        if PTX:
            a, b, c, d = tl.inline_asm_elementwise(
                _FLOAT8, "=h,=h,=h,=h,r", [words], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True, pack=1,
            )  # fmt: skip
        else:
            a, b, c, d = _float8(words, 0), _float8(words, 1), _float8(words, 2), _float8(words, 3)
        return tl.join(tl.join(a, b), tl.join(c, d))
    elif PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            _INTEGER4, "=r,=r,=r,=r,r", [words], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
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
    first, second = (words >> (4 * q)) & 15, (words >> (4 * q + 16)) & 15
    return tl.join(first.to(tl.float32) + 128.0, second.to(tl.float32) + 128.0)


@triton.jit
def matrix(upper, lower, CODE: tl.constexpr, PTX: tl.constexpr, WARPS: tl.constexpr):
    """Codes [4 (t), 8 (g), WARPS, ..] of rows g, and of rows 8 + g, as numbers [WARPS, 16, TILE_K]."""
    both = tl.join(_numbers(upper, CODE, PTX), _numbers(lower, CODE, PTX))
    if CODE == 0:
        # t g W w i p h: W h g w t p i
        return tl.reshape(tl.permute(both, [2, 6, 1, 3, 0, 5, 4]), [WARPS, 16, 64])
    else:
        # t g W w i q%2 q/2 h: W h g w q/2 t q%2 i
        return tl.reshape(tl.permute(both, [2, 7, 1, 3, 6, 0, 5, 4]), [WARPS, 16, 128])


@triton.jit
def low(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(pair):
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def halves(pair, PTX: tl.constexpr):
    if PTX:
        return _pair(pair)
    else:
        return tl.join(low(pair), high(pair))


@triton.jit
def _rounded(low, high):
    """Two float32 as int32 of two bfloat16, without the means of a GPU: to the nearest, to even between two."""
    low, high = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
    low += 32767 + ((low >> 16) & 1)
    high += 32767 + ((high >> 16) & 1)
    return ((low >> 16) & 65535) | (high & -65536)


@triton.jit
def plus(x, y, PTX: tl.constexpr):
    """Of pairs of bfloat16."""
    if PTX:
        return tl.inline_asm_elementwise(_ADD, "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return _rounded(low(x) + low(y), high(x) + high(y))


@triton.jit
def times(x, y, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(_MULTIPLY, "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return _rounded(low(x) * low(y), high(x) * high(y))


@triton.jit
def in_order_of_nibbles(a, b, c, d, READY: tl.constexpr, PTX: tl.constexpr, WARPS: tl.constexpr):
    """Pairs of four times eight columns, [4 (t), 8 (g), WARPS, 4] each, as [WARPS, 128, 8 (g)] of int4's tile. READY:
    each eight lie as `dot_rows.Ready` has them.
    """
    upper, lower = tl.join(halves(a, PTX), halves(b, PTX)), tl.join(halves(c, PTX), halves(d, PTX))
    both = tl.reshape(tl.join(upper, lower), [4, 8, WARPS, 2, 2, 2, 2, 2])
    # t g W i q/2 q%2 w%2 w/2, READY: t g W q%2 q/2 i w%2 w/2; to W w/2 w%2 q/2 t q%2 i g
    if READY:
        return tl.reshape(tl.permute(both, [2, 7, 6, 4, 0, 3, 5, 1]), [WARPS, 128, 8])
    else:
        return tl.reshape(tl.permute(both, [2, 7, 6, 4, 0, 5, 3, 1]), [WARPS, 128, 8])
