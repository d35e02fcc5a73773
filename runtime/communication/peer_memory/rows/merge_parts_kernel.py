"""Parts of an attention over all ranks put together, in one kernel that also brings them; see `merge_parts.py`."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.communication.peer_memory.signals import await_words, bring_near, put_words

__all__ = ["merge"]


@triton.jit
def merge(
    parts,  # float32 [rows, DV + 1]
    out,
    sinks,
    table,
    counters,
    late,
    abandoned,
    patience_ns,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    LANES: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SINKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program per row, a lane for two of its numbers. EARLY: whether it was launched before its predecessor's end.

    What is in flight lies where `small` has it, whose counters these are: a block waits for all others in every call.
    """
    row = tl.program_id(0)
    lane = tl.arange(0, LANES)
    first = 2 * lane
    areas = ()
    for rank in tl.static_range(RANKS):
        areas = areas + (tl.load(table + rank),)
    if EARLY:
        bring_near(counters + row)
        gdc_launch_dependents()
        gdc_wait()
    number = tl.load(counters + row) + 1
    inside = (((number & 1) * BLOCKS + row) * UNITS).to(tl.int64) * 16
    area = 2 * BLOCKS * UNITS * 16
    own_area = areas[RANK]
    parts += row * (DV + 1)
    ok = (first <= DV).to(tl.int32)
    low = tl.load(parts + first, mask=first <= DV, other=0.0).to(tl.int32, bitcast=True)
    high = tl.load(parts + first + 1, mask=first < DV, other=0.0).to(tl.int32, bitcast=True)
    for step in tl.static_range(1, RANKS):
        put_words(areas[(RANK + step) % RANKS] + RANK * area + inside + 16 * lane, low, high, number, ok)
    # every lane reads all log-sum-exps
    sizes = ()
    for peer in tl.static_range(RANKS):
        if peer == RANK:
            size = tl.load(parts + DV + 0 * lane)
        else:
            at = own_area + peer * area + inside + 16 * (DV // 2 + 0 * lane)
            even, odd = await_words(at, number, lane * 0 + 1, late + 4 * peer, abandoned, patience_ns)
            if DV % 2 == 0:
                size = even.to(tl.float32, bitcast=True)
            else:
                size = odd.to(tl.float32, bitcast=True)
        sizes = sizes + (size,)
    top = sizes[0]
    for peer in tl.static_range(1, RANKS):
        top = tl.maximum(top, sizes[peer])
    if SINKS:
        sink = tl.load(sinks + row % HEADS + 0 * lane).to(tl.float32)
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = base * 0.0
    if SINKS:
        total += tl.exp(sink - base)
    lows, highs = base * 0.0, base * 0.0
    for peer in tl.static_range(RANKS):
        if peer == RANK:
            its_low, its_high = low, high
        else:
            at = own_area + peer * area + inside + 16 * lane
            its_low, its_high = await_words(at, number, ok, late + 4 * peer, abandoned, patience_ns)
        weight = tl.exp(sizes[peer] - base)
        total += weight
        lows += weight * its_low.to(tl.float32, bitcast=True)
        highs += weight * its_high.to(tl.float32, bitcast=True)
    total = tl.where(total == 0, 1.0, total)
    out += row * DV
    tl.store(out + first, (lows / total).to(out.dtype.element_ty), mask=first < DV)
    tl.store(out + first + 1, (highs / total).to(out.dtype.element_ty), mask=first + 1 < DV)
    tl.debug_barrier()  # all threads have read the counter
    tl.store(counters + row, number)
