"""Sums of small pieces as `small_kernel.py` has them, with the residual and the norm behind them; Triton.

A program takes a row. Its words go where those of the kernel for small pieces go, and both count the calls of a block
alike: so calls of one may follow those of the other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.communication.peer_memory.signals import await_words, bring_near, put_words
from runtime.communication.peer_memory.small_kernel import as_double_word, high_half, joined, low_half

__all__ = ["sum_norm_of_few"]


@triton.jit
def sum_norm_of_few(
    x, residual, weight, total, normed, table, counters, late, abandoned, patience_ns, width, eps,
    RANK: tl.constexpr, RANKS: tl.constexpr, WEIGHTED: tl.constexpr, KIND: tl.constexpr, UNITS: tl.constexpr,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """All tensors as int64: four numbers of KIND each. `width`: of a row, a multiple of UNITS.

    Sums are taken in order of coordinate, in float32; the residual is added to them, and that is rounded once. EARLY:
    whether it was launched before its predecessor's end.
    """
    row = tl.program_id(0)
    lane = tl.arange(0, PADDED)
    live = lane < width
    at = row * width + lane
    areas = ()
    for rank in tl.static_range(RANKS):
        areas = areas + (tl.load(table + rank),)
    if EARLY:
        bring_near(counters + row * (width // UNITS))
        gdc_launch_dependents()
        gdc_wait()
    number = tl.load(counters + at // UNITS, mask=live, other=0) + 1
    inside = ((number & 1) * (BLOCKS * UNITS) + at).to(tl.int64) * 16
    area = 2 * BLOCKS * UNITS * 16
    ok = live.to(tl.int32)
    own = tl.load(x + at, mask=live, other=0)
    for step in tl.static_range(1, RANKS):
        to = areas[(RANK + step) % RANKS] + RANK * area + inside
        put_words(to, own.to(tl.int32), (own >> 32).to(tl.int32), number, ok)
    before = tl.load(residual + at, mask=live, other=0)
    if WEIGHTED:
        scale = tl.load(weight + lane, mask=live, other=0)
    for peer in tl.static_range(RANKS):
        if peer == RANK:
            low, high = own.to(tl.int32), (own >> 32).to(tl.int32)
        else:
            low, high = await_words(
                areas[RANK] + peer * area + inside, number, ok, late + 4 * peer, abandoned, patience_ns
            )
        a, b, c, d = low_half(low, KIND), high_half(low, KIND), low_half(high, KIND), high_half(high, KIND)
        if peer == 0:
            sum_a, sum_b, sum_c, sum_d = a, b, c, d
        else:
            sum_a, sum_b, sum_c, sum_d = sum_a + a, sum_b + b, sum_c + c, sum_d + d
    low, high = before.to(tl.int32), (before >> 32).to(tl.int32)
    low = joined(sum_a + low_half(low, KIND), sum_b + high_half(low, KIND), KIND)
    high = joined(sum_c + low_half(high, KIND), sum_d + high_half(high, KIND), KIND)
    tl.store(total + at, as_double_word(low, high), mask=live)
    a, b, c, d = low_half(low, KIND), high_half(low, KIND), low_half(high, KIND), high_half(high, KIND)
    squares = tl.sum(tl.where(live, a * a + b * b + c * c + d * d, 0.0), 0)
    factor = tl.rsqrt(squares / (width * 4) + eps)
    a, b, c, d = a * factor, b * factor, c * factor, d * factor
    if WEIGHTED:
        low, high = scale.to(tl.int32), (scale >> 32).to(tl.int32)
        a, b = a * low_half(low, KIND), b * high_half(low, KIND)
        c, d = c * low_half(high, KIND), d * high_half(high, KIND)
    tl.store(normed + at, as_double_word(joined(a, b, KIND), joined(c, d, KIND)), mask=live)
    tl.debug_barrier()  # all threads have read the counters
    tl.store(counters + at // UNITS, number, mask=live & (at % UNITS == 0))
