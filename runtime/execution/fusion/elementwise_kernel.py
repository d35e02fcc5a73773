"""The kernels of `operations.py`: each reads its operands once, computes in float32 and writes once; Triton.

rotate      a program turns `HEADS` heads of one token
gate        a program takes `BLOCK` numbers of a row
add_norm    a program takes a row

EARLY: whether they are launched before their predecessor's end, and their successor before theirs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.ops.kernels.decode.activations_kernel import activated

__all__ = ["add_norm", "gate", "rotate"]


@triton.jit(do_not_specialize=["size", "x_b", "cos_b", "sin_b", "out_b"])
def rotate(
    x, cos, sin, out, heads, size,
    x_b, x_h, x_s, x_d, cos_b, cos_h, cos_s, cos_d, sin_b, sin_h, sin_s, sin_d, out_b, out_h, out_s,
    WIDTH: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    b, s = token // size, token % size
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, PADDED)[None, :]
    live = (h < heads) & (d < WIDTH)
    turned = (d + HALF) % WIDTH
    row = x + b * x_b + s * x_s + h * x_h
    straight = tl.load(row + d * x_d, mask=live, other=0.0).to(tl.float32)
    across = tl.load(row + turned * x_d, mask=live, other=0.0).to(tl.float32)
    c = tl.load(cos + b * cos_b + s * cos_s + h * cos_h + d * cos_d, mask=live, other=0.0).to(tl.float32)
    i = tl.load(sin + b * sin_b + s * sin_s + h * sin_h + d * sin_d, mask=live, other=0.0).to(tl.float32)
    found = straight * c + across * i
    tl.store(out + b * out_b + s * out_s + h * out_h + d, found.to(out.dtype.element_ty), mask=live)


@triton.jit
def gate(a, b, out, width, a_row, b_row, ACT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = n < width
    x = tl.load(a + row * a_row + n, mask=live, other=0.0).to(tl.float32)
    y = tl.load(b + row * b_row + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * width + n, (activated(x, ACT) * y).to(out.dtype.element_ty), mask=live)


@triton.jit
def add_norm(
    a, b, weight, total, normed, width, a_row, b_row, eps, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    live = n < width
    x = tl.load(a + row * a_row + n, mask=live, other=0.0).to(tl.float32)
    x += tl.load(b + row * b_row + n, mask=live, other=0.0).to(tl.float32)
    rounded = x.to(total.dtype.element_ty)
    tl.store(total + row * width + n, rounded, mask=live)
    x = rounded.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    if WEIGHTED:
        x = x * tl.load(weight + n, mask=live, other=0.0).to(tl.float32)
    tl.store(normed + row * width + n, x.to(normed.dtype.element_ty), mask=live)
