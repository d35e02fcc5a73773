"""The product of a few rows with a matrix, and what stands around it, in one kernel of Triton: as fast as memory is.

Each program takes `TILE_N` rows of the matrix and all of their columns. Its first weights are under way before it waits
for the kernel before it (programmatic dependent launch: CUDA C++ programming guide, section 4.5), so that the memory
rests as little as can be between kernels. A norm before the product costs nothing: its factor comes out of the same
loop, and multiplies the sums.

few_rows       a part of the columns at a time, of any number
whole_row      all columns at once, of one row with its norm: all of a program's weights are under way before it waits
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.ops.kernels.decode.activations_kernel import activated

__all__ = ["few_rows", "put", "row_at", "whole_row"]

_EACH = tl.constexpr(8)
"""Columns that a thread has one after the other: what it sums before anything else."""


@triton.jit
def _weights_at(at, columns, live, inner, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at + columns[None, :], mask=live, other=0.0)
    else:
        return tl.load(at + columns[None, :], mask=live & (columns < inner)[None, :], other=0.0)


@triton.jit
def row_at(x, added, total, norm, row, columns, inner, writes, ADDS: tl.constexpr, WEIGHTED: tl.constexpr):
    """What the norm is of, and that times its weight."""
    inside = columns < inner
    own = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        own += tl.load(added + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = own.to(total.dtype.element_ty)
        if writes:
            tl.store(total + row * inner + columns, rounded, mask=inside)
        own = rounded.to(tl.float32)
    scaled = own
    if WEIGHTED:
        scaled = own * tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)
    return own, scaled


@triton.jit
def put(
    out, sums, gates, squares, bias, eps, n, num_out, inner,
    AXIS: tl.constexpr, NORMS: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One row of what is still to be added up along AXIS, and what stands behind it. squares: of what is normalised."""
    y = tl.sum(sums, AXIS)
    if NORMS:
        factor = tl.rsqrt(tl.sum(squares, 0) / inner + eps)
        y *= factor
    if ACT != "":
        gated = tl.sum(gates, AXIS)
        if NORMS:
            gated *= factor
        y *= activated(gated, ACT)
    if BIAS:
        y += tl.load(bias + n, mask=n < num_out, other=0.0).to(tl.float32)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n < num_out)


@triton.jit
def few_rows(
    x, added, norm, weight, gate, bias, out, total, eps, num_out, inner, x_row, added_row, weight_row, gate_row,
    ROWS: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr, WEIGHTED: tl.constexpr, ACT: tl.constexpr,
    BIAS: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x, added: [ROWS, inner]; weight, gate: [num_out, inner]; out: [ROWS, num_out]; total: [ROWS, inner].

    With ACT, the result is ACT(x gate^T) * (x weight^T). EARLY: whether it was launched before its predecessor's end.
    """
    program = tl.program_id(0)
    n = program * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    live = (n < num_out)[:, None]
    at = weight + n.to(tl.int64)[:, None] * weight_row
    first = _weights_at(at, k, live, inner, EVEN)
    if ACT != "":
        gate_at = gate + n.to(tl.int64)[:, None] * gate_row
        first_gate = _weights_at(gate_at, k, live, inner, EVEN)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    sums = ()
    gates = ()
    squares = ()
    for row in tl.static_range(ROWS):
        own, scaled = row_at(
            x + row * x_row, added + row * added_row, total, norm, row, k, inner, program == 0, ADDS, WEIGHTED
        )
        sums = sums + (first.to(tl.float32) * scaled[None, :],)
        if ACT != "":
            gates = gates + (first_gate.to(tl.float32) * scaled[None, :],)
        squares = squares + (own * own,)
    for start in tl.range(TILE_K, inner, TILE_K, num_stages=1):
        columns = start + k
        weights = _weights_at(at, columns, live, inner, EVEN)
        if ACT != "":
            gate_weights = _weights_at(gate_at, columns, live, inner, EVEN)
        new_sums = ()
        new_gates = ()
        new_squares = ()
        for row in tl.static_range(ROWS):
            own, scaled = row_at(
                x + row * x_row, added + row * added_row, total, norm, row, columns, inner, program == 0, ADDS, WEIGHTED
            )
            new_sums = new_sums + (sums[row] + weights.to(tl.float32) * scaled[None, :],)
            if ACT != "":
                new_gates = new_gates + (gates[row] + gate_weights.to(tl.float32) * scaled[None, :],)
            if NORMS:
                new_squares = new_squares + (squares[row] + own * own,)
            else:
                new_squares = new_squares + (squares[row],)
        sums = new_sums
        gates = new_gates
        squares = new_squares
    for row in tl.static_range(ROWS):
        gate_sums = gates[row] if ACT != "" else None
        put(
            out + row * num_out, sums[row], gate_sums, squares[row], bias, eps, n, num_out, inner, 1, NORMS, ACT, BIAS
        )  # fmt: skip


@triton.jit
def _not_before(x, zero, PTX: tl.constexpr):
    """The same numbers of 16 bits: but what is computed of them stays behind the load that `zero` comes from.

    Otherwise the assembler moves conversions in front of the wait for the kernel before, where they wait for weights.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "xor.b32 $0, $1, $2;", "=r,r,r,r", [x, zero], dtype=x.dtype, is_pure=True, pack=2
        )
    else:
        return x


@triton.jit
def _in_threads(x, TILE_N: tl.constexpr, LANES: tl.constexpr):
    return tl.sum(tl.reshape(x, [TILE_N, LANES, _EACH]), axis=2)


@triton.jit(do_not_specialize=["nothing"])
def whole_row(
    x, added, norm, weight, gate, bias, out, total, eps, num_out, inner, weight_row, gate_row, nothing,
    ADDS: tl.constexpr, WEIGHTED: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, TILE_N: tl.constexpr,
    TILE_K: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """As `few_rows` of one row with NORMS, of numbers of 16 bits and CHUNKS times TILE_K columns. nothing: 0."""
    lanes: tl.constexpr = TILE_K // _EACH
    program = tl.program_id(0)
    n = program * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    live = (n < num_out)[:, None]
    at = weight + n.to(tl.int64)[:, None] * weight_row
    gate_at = gate + n.to(tl.int64)[:, None] * gate_row
    weights = ()
    gate_weights = ()
    norms = ()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * TILE_K + k
        weights = weights + (_weights_at(at, columns, live, inner, EVEN),)
        if ACT != "":
            gate_weights = gate_weights + (_weights_at(gate_at, columns, live, inner, EVEN),)
    for chunk in tl.static_range(CHUNKS):
        if WEIGHTED:
            columns = chunk * TILE_K + k
            norms = norms + (tl.load(norm + columns, mask=columns < inner, other=0.0),)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    zero = tl.load(x).to(tl.int16, bitcast=True).to(tl.int32) & nothing
    xs = ()
    others = ()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * TILE_K + k
        xs = xs + (tl.load(x + columns, mask=columns < inner, other=0.0),)
        if ADDS:
            others = others + (tl.load(added + columns, mask=columns < inner, other=0.0),)
    sums = tl.zeros((TILE_N, lanes), tl.float32)
    gates = tl.zeros((TILE_N, lanes), tl.float32)
    squares = tl.zeros((lanes,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        own = xs[chunk].to(tl.float32)
        if ADDS:
            rounded = (own + others[chunk].to(tl.float32)).to(total.dtype.element_ty)
            columns = chunk * TILE_K + k
            if program == 0:
                tl.store(total + columns, rounded, mask=columns < inner)
            own = rounded.to(tl.float32)
        squares += tl.sum(tl.reshape(own * own, [lanes, _EACH]), axis=1)
        if WEIGHTED:
            own *= _not_before(norms[chunk], zero, PTX).to(tl.float32)
        sums += _in_threads(_not_before(weights[chunk], zero, PTX).to(tl.float32) * own[None, :], TILE_N, lanes)
        if ACT != "":
            numbers = _not_before(gate_weights[chunk], zero, PTX).to(tl.float32)
            gates += _in_threads(numbers * own[None, :], TILE_N, lanes)
    put(out, sums, gates, squares, bias, eps, n, num_out, inner, 1, True, ACT, BIAS)
