"""The product of several rows with a matrix, and what stands behind it, in one kernel of Triton: as fast as memory is.

A program takes `TILE_M` rows of the matrix, which are the large operand of its tensor cores' products, `TILE_N` rows of
x, which are the small one, and one of `SPLITS` parts of the columns. All programs run at once, with several tiles of
each under way. Before it waits for the kernel before it (programmatic dependent launch: CUDA C++ programming guide,
section 4.5), a program asks the second-level cache for its first `AHEAD` columns: so the memory does not rest while
small kernels run between products. The kernel behind this one is let in `BEHIND` steps before the end, and not earlier:
what it asks the cache for would be gone again before it is read.

The program of a tile that comes last adds its parts up, in their order: the sums do not depend on who that is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.ops.kernels.decode.activations_kernel import activated

__all__ = ["added_up", "ask_for", "several_rows"]


@triton.jit
def ask_for(at, BYTES: tl.constexpr):
    """BYTES (a multiple of 16, as text) from each address on, for the second-level cache."""
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], " + BYTES + "; mov.u32 $0, 0; }",
        "=r,l",
        [at],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def added_up(parts, place, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """The sum of parts that lie SIZE numbers apart, in their order."""
    sums = tl.load(parts + place, cache_modifier=".cg")
    for other in tl.static_range(1, SPLITS):
        sums += tl.load(parts + other * SIZE + place, cache_modifier=".cg")
    return sums


@triton.jit(do_not_specialize=["num_rows"])
def several_rows(
    x, weight, gate, weight_tiles, gate_tiles, bias, out, parts, counters, num_rows, num_out, inner, x_row, weight_row,
    gate_row, ACT: tl.constexpr, BIAS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, BYTES: tl.constexpr, BEHIND: tl.constexpr,
    EVEN: tl.constexpr, EARLY: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """x: [num_rows, inner]; weight, gate: [num_out, inner], and the same as tensors of which tiles are loaded; out:
    [num_rows, num_out]; parts: [tiles, SPLITS, GATED, TILE_M, TILE_N] float32; counters: 0 for each tile, before and
    after.

    With ACT, the result is ACT(x gate^T) * (x weight^T), and GATED is 2, else 1. EARLY: whether it was launched before
    its predecessor's end. BYTES: those of AHEAD columns; "": none.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    m = tile * TILE_M + tl.arange(0, TILE_M)
    n = tl.arange(0, TILE_N)
    k = tl.arange(0, TILE_K)
    steps = tl.cdiv(inner, TILE_K)
    each = tl.cdiv(steps, SPLITS)
    first = split * each
    last = tl.minimum(first + each, steps)
    if EARLY:
        if BYTES != "":
            row = tl.minimum(m, num_out - 1).to(tl.int64)
            column = tl.minimum(first * TILE_K, (inner - AHEAD) // 8 * 8)
            ask_for(weight + row * weight_row + column, BYTES)
            if ACT != "":
                ask_for(gate + row * gate_row + column, BYTES)
        gdc_wait()
    sums = tl.zeros([TILE_M, TILE_N], tl.float32)
    gates = tl.zeros([TILE_M, TILE_N], tl.float32)
    x_at = x + n[:, None] * x_row + k[None, :]
    is_row = (n < num_rows)[:, None]
    for step in tl.range(first, last, num_stages=STAGES):
        if EARLY:
            if step == last - BEHIND:
                gdc_launch_dependents()
        start = step * TILE_K
        weights = weight_tiles.load([tile * TILE_M, start])
        if EVEN:
            own = tl.load(x_at + start, mask=is_row, other=0.0)
        else:
            own = tl.load(x_at + start, mask=is_row & (k < inner - start)[None, :], other=0.0)
        own = tl.trans(own)
        sums = tl.dot(weights, own, sums)
        if ACT != "":
            gates = tl.dot(gate_tiles.load([tile * TILE_M, start]), own, gates)
    if EARLY:
        gdc_launch_dependents()  # of a part that has fewer steps
    is_last = True
    if SPLITS > 1:
        place = tl.arange(0, TILE_M)[:, None] * TILE_N + n[None, :]
        parts += tile.to(tl.int64) * (SPLITS * GATED * TILE_M * TILE_N)
        tl.store(parts + split * (GATED * TILE_M * TILE_N) + place, sums)
        if ACT != "":
            tl.store(parts + split * (GATED * TILE_M * TILE_N) + TILE_M * TILE_N + place, gates)
        tl.debug_barrier()
        is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            tl.store(counters + tile, 0)
            sums = added_up(parts, place, SPLITS, GATED * TILE_M * TILE_N)
            if ACT != "":
                gates = added_up(parts + TILE_M * TILE_N, place, SPLITS, GATED * TILE_M * TILE_N)
    if is_last:
        live = m < num_out
        if ACT != "":
            sums *= activated(gates, ACT)
        if BIAS:
            sums += tl.load(bias + m, mask=live, other=0.0).to(tl.float32)[:, None]
        at = n[None, :].to(tl.int64) * num_out + m[:, None]
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=live[:, None] & (n < num_rows)[None, :])
