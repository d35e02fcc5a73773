"""The product of a few rows with a matrix, and what stands around it, in one kernel of Triton: as fast as memory is.

Each program takes `TILE_N` rows of the matrix and all of their columns. Its first weights are under way before it waits
for the kernel before it (programmatic dependent launch: CUDA C++ programming guide, section 4.5), so that the memory
rests as little as can be between kernels. A norm before the product costs nothing: its factor comes out of the same
loop, and multiplies the sums.

What does not fit into registers may be fetched into the L2 cache before that wait: FETCH columns behind the first, and
`ahead`, of the matrices of the kernel behind this one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.ops.kernels.decode.activations_kernel import activated
from runtime.ops.kernels.decode.partial_sums_kernel import begin_pulling, begin_pushing, clear_last, pull, push

__all__ = ["few_rows"]


@triton.jit
def _fetch(start, pitch, rows, num_bytes):
    """Into the L2 cache, `num_bytes` in sixteens of each of `rows` rows, `pitch` bytes apart; a thread takes one."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred mine, some;
            .reg .b32 thread;
            .reg .b64 from;
            mov.u32 thread, %tid.x;
            setp.gt.s32 some, $4, 0;
            setp.lt.and.s32 mine, thread, $3, some;
            mad.wide.u32 from, thread, $2, $1;
            @mine cp.async.bulk.prefetch.L2.global [from], $4;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r,r,r",
        [start, pitch, rows, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _fetch_ahead(program, ahead, ahead_gap, ahead_bytes):
    """Programs with even numbers take one matrix, those with odd ones what is `ahead_gap` bytes behind it."""
    turn = program.to(tl.int64)
    _fetch(ahead.to(tl.int64) + turn % 2 * ahead_gap + turn // 2 * ahead_bytes, 0, 1, ahead_bytes)


@triton.jit
def _weights_at(at, columns, live, inner, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at + columns[None, :], mask=live, other=0.0)
    else:
        return tl.load(at + columns[None, :], mask=live & (columns < inner)[None, :], other=0.0)


@triton.jit
def _row_at(
    x, added, total, norm, row, columns, inner, part, writes,
    ADDS: tl.constexpr, RANKS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """What the norm is of, and that times its weight. RANKS: of so many parts `added` is the sum."""
    inside = columns < inner
    own = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        if RANKS == 1:
            own += tl.load(added + columns, mask=inside, other=0.0).to(tl.float32)
        else:
            for rank in tl.static_range(RANKS):
                came = tl.load(added + rank * part + columns, mask=inside, other=0.0, cache_modifier=".cg")
                if rank == 0:
                    parts = came.to(tl.float32)
                else:
                    parts += came.to(tl.float32)
            own += parts.to(total.dtype.element_ty).to(tl.float32)
        rounded = own.to(total.dtype.element_ty)
        if writes:
            tl.store(total + row * inner + columns, rounded, mask=inside)
        own = rounded.to(tl.float32)
    scaled = own
    if WEIGHTED:
        scaled = own * tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)
    return own, scaled


@triton.jit
def few_rows(
    x, added, norm, weight, gate, bias, out, total, eps, num_out, inner, x_row, added_row, weight_row, gate_row,
    table, calls, late, abandoned, patience_ns, start, part, ahead, ahead_gap, ahead_bytes,
    ROWS: tl.constexpr, ADDS: tl.constexpr, NORMS: tl.constexpr, WEIGHTED: tl.constexpr, ACT: tl.constexpr,
    BIAS: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
    PUSHES: tl.constexpr, PULLS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, UNITS: tl.constexpr,
    FETCH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """x, added: [ROWS, inner]; weight, gate: [num_out, inner]; out: [ROWS, num_out]; total: [ROWS, inner].

    With ACT, the result is ACT(x gate^T) * (x weight^T). EARLY: whether it was launched before its predecessor's end.
    PUSHES: the result goes to all ranks; PULLS: what is added is their sum. See `partial_sums_kernel.py`.
    AHEAD: whether what the next kernel reads is fetched "first", or "last", or "": not.
    """
    program = tl.program_id(0)
    n = program * TILE_N + tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    live = (n < num_out)[:, None]
    at = weight + n.to(tl.int64)[:, None] * weight_row
    weights = _weights_at(at, k, live, inner, EVEN)
    gates = weights
    if ACT != "":
        gate_at = gate + n.to(tl.int64)[:, None] * gate_row
        gates = _weights_at(gate_at, k, live, inner, EVEN)
    if FETCH > 0:
        size: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
        top = (program * TILE_N).to(tl.int64)
        rows = tl.minimum(TILE_N, num_out - program * TILE_N)
        fetched = tl.minimum(FETCH, inner - TILE_K) * size
        _fetch((weight + top * weight_row + TILE_K).to(tl.int64), weight_row * size, rows, fetched)
        if ACT != "":
            _fetch((gate + top * gate_row + TILE_K).to(tl.int64), gate_row * size, rows, fetched)
    if AHEAD == "first":
        _fetch_ahead(program, ahead, ahead_gap, ahead_bytes)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if PUSHES:
        number = begin_pushing(calls, program)
    if PULLS:
        number = begin_pulling(calls, program)
        added = pull(x, table, number, late, abandoned, patience_ns, start, part, ROWS * inner, RANK, RANKS, UNITS)
    sums = ()
    gated = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((TILE_N, TILE_K), tl.float32),)
        gated = gated + (tl.zeros((TILE_N, TILE_K), tl.float32),)
        squares = squares + (tl.zeros((TILE_K,), tl.float32),)
    for begin in tl.range(0, inner, TILE_K, num_stages=1):
        new_sums = ()
        new_gated = ()
        new_squares = ()
        for row in tl.static_range(ROWS):
            own, scaled = _row_at(
                x + row * x_row, added + row * added_row, total, norm, row, begin + k, inner, part, program == 0,
                ADDS, RANKS if PULLS else 1, WEIGHTED,
            )  # fmt: skip
            new_sums = new_sums + (sums[row] + weights.to(tl.float32) * scaled[None, :],)
            if ACT != "":
                new_gated = new_gated + (gated[row] + gates.to(tl.float32) * scaled[None, :],)
            else:
                new_gated = new_gated + (gated[row],)
            if NORMS:
                new_squares = new_squares + (squares[row] + own * own,)
            else:
                new_squares = new_squares + (squares[row],)
        sums = new_sums
        gated = new_gated
        squares = new_squares
        following = begin + TILE_K
        weights = _weights_at(at, following + k, live & (following < inner), inner, EVEN)
        if ACT != "":
            gates = _weights_at(gate_at, following + k, live & (following < inner), inner, EVEN)
    if AHEAD == "last":
        _fetch_ahead(program, ahead, ahead_gap, ahead_bytes)
    for row in tl.static_range(ROWS):
        y = tl.sum(sums[row], 1)
        if NORMS:
            factor = tl.rsqrt(tl.sum(squares[row], 0) / inner + eps)
            y *= factor
        if ACT != "":
            z = tl.sum(gated[row], 1)
            if NORMS:
                z *= factor
            y *= activated(z, ACT)
        if BIAS:
            y += tl.load(bias + n, mask=n < num_out, other=0.0).to(tl.float32)
        if PUSHES:
            push(y, x, table, number, start, part, row * num_out + n, n < num_out, RANK, RANKS)
        else:
            tl.store(out + row * num_out + n, y.to(out.dtype.element_ty), mask=n < num_out)
    if PULLS:
        clear_last(x, table, calls, number, start, part, ROWS * inner, program, RANK, RANKS)
