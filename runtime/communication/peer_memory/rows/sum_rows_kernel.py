"""The kernels of `sum_rows.py`, Triton.

meet        every rank says that it has come so far, and waits until all others have
sum_norm    a program takes one of this rank's rows: the sum of what all ranks brought, a residual, the norm
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.communication.peer_memory.signals import await_flag, raise_flag

__all__ = ["meet", "sum_norm"]


@triton.jit
def meet(
    table, counter, late, abandoned, patience_ns, start_of_flags, RANK: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """One program. The counter is on the device, so that a captured meeting is a new one whenever it is replayed."""
    number = tl.load(counter) + 1
    own = tl.load(table + RANK) + start_of_flags
    for step in tl.static_range(1, RANKS):
        peer = (RANK + step) % RANKS
        raise_flag(tl.load(table + peer) + start_of_flags + RANK * 4, number)
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            await_flag(own + peer * 4, number, late + 4 * peer, abandoned, patience_ns)
    tl.debug_barrier()
    tl.store(counter, number)


@triton.jit
def sum_norm(
    x, area, residual, weight, total, normed, width, piece, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, ADDS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`area`: a part of `piece` elements for each rank, with what it brought for these rows; the own part takes the
    normed rows, which the others read there. Sums are taken in order of coordinate, in float32, and rounded once.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    live = n < width
    at = row * width + n
    for peer in tl.static_range(RANKS):
        if peer == RANK:
            part = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        else:
            part = tl.load(area + peer * piece + at, mask=live, other=0.0).to(tl.float32)
        if peer == 0:
            value = part
        else:
            value += part
    if ADDS:
        value += tl.load(residual + at, mask=live, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=live)
    value = rounded.to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    if WEIGHTED:
        value = value * tl.load(weight + n, mask=live, other=0.0).to(tl.float32)
    said = value.to(normed.dtype.element_ty)
    tl.store(normed + at, said, mask=live)
    tl.store(area + RANK * piece + at, said, mask=live)
