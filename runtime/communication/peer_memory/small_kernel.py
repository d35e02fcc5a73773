"""The kernel for small pieces; see `large_kernel.py` for what both do."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.communication.peer_memory.signals import await_words, bring_near, put_words

__all__ = ["as_double_word", "high_half", "joined", "low_half", "small"]


@triton.jit
def low_half(word, KIND: tl.constexpr):
    """Of 32 bits; as float32."""
    if KIND == "bfloat16":
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word, KIND: tl.constexpr):
    if KIND == "bfloat16":
        return (word & -65536).to(tl.float32, bitcast=True)
    else:
        return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def joined(low, high, KIND: tl.constexpr):
    """Two float32 rounded, as 32 bits."""
    if KIND == "bfloat16":
        first = low.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
        second = high.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        first = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        second = high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return (first & 65535) | (second << 16)


@triton.jit
def as_double_word(low, high):
    return (low.to(tl.int64) & 4294967295) | (high.to(tl.int64) << 32)


@triton.jit
def small(
    x,  # int64: eight bytes of whatever it holds
    out,
    residual,
    table,
    counters,
    late,
    abandoned,
    patience_ns,
    total,
    piece,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    SPREADS: tl.constexpr,
    KIND: tl.constexpr,
    ADDS: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`total`, `piece`: eights of bytes; KIND: what is summed, "" lays side by side. Each block has UNITS of them.
    ADDS: the residual too, to the sum of numbers of 16 bits, which is rounded once.

    EARLY: whether it was launched before its predecessor's end.
    """
    block = tl.program_id(0)
    lane = tl.arange(0, UNITS)
    at = block * UNITS + lane
    # nobody writes the table, so it can be read before the wait; the counter is brought near
    areas = ()
    for rank in tl.static_range(RANKS):
        areas = areas + (tl.load(table + rank),)
    if EARLY:
        bring_near(counters + block)
        gdc_launch_dependents()
        gdc_wait()
    number = tl.load(counters + block) + 1
    inside = (((number & 1) * BLOCKS + block) * UNITS + lane).to(tl.int64) * 16
    area = 2 * BLOCKS * UNITS * 16
    own_area = areas[RANK]
    if SPREADS:
        own = tl.load(x + RANK * piece + at, mask=at < piece, other=0)
    else:
        own = tl.load(x + at, mask=at < piece, other=0)
    for step in tl.static_range(1, RANKS):
        peer = (RANK + step) % RANKS
        if SPREADS:
            word = tl.load(x + peer * piece + at, mask=at < piece, other=0)
        else:
            word = own
        ok = (at < piece).to(tl.int32)
        if SHIFT != 0:
            if peer != (RANK + SHIFT) % RANKS:
                ok = (lane < 1).to(tl.int32)  # nothing, but that this rank has come
        to = areas[(RANK + step) % RANKS] + RANK * area + inside
        put_words(to, word.to(tl.int32), (word >> 32).to(tl.int32), number, ok)
    if ADDS:
        before = tl.load(residual + at, mask=at < piece, other=0)
    ok = (at < piece).to(tl.int32)
    for peer in tl.static_range(RANKS):
        if peer == RANK:
            low, high = own.to(tl.int32), (own >> 32).to(tl.int32)
        else:
            expected = ok
            if SHIFT != 0:
                if peer != (RANK - SHIFT) % RANKS:
                    expected = (lane < 1).to(tl.int32)
            low, high = await_words(
                own_area + peer * area + inside, number, expected, late + 4 * peer, abandoned, patience_ns
            )
        if KIND == "":
            if SHIFT != 0:
                if peer == (RANK - SHIFT) % RANKS:
                    tl.store(out + at, as_double_word(low, high), mask=at < piece)
            else:
                tl.store(out + peer * piece + at, as_double_word(low, high), mask=at < piece)
        elif KIND == "bfloat16" or KIND == "float16":
            a, b, c, d = low_half(low, KIND), high_half(low, KIND), low_half(high, KIND), high_half(high, KIND)
            if peer == 0:
                sum_a, sum_b, sum_c, sum_d = a, b, c, d
            else:
                sum_a, sum_b, sum_c, sum_d = sum_a + a, sum_b + b, sum_c + c, sum_d + d
        elif KIND == "float32":
            a, b = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
            if peer == 0:
                sum_a, sum_b = a, b
            else:
                sum_a, sum_b = sum_a + a, sum_b + b
        elif KIND == "int32":
            if peer == 0:
                sum_a, sum_b = low, high
            else:
                sum_a, sum_b = sum_a + low, sum_b + high
        elif KIND == "float64":
            a = as_double_word(low, high).to(tl.float64, bitcast=True)
            if peer == 0:
                sum_a = a
            else:
                sum_a = sum_a + a
        else:
            tl.static_assert(KIND == "int64")
            a = as_double_word(low, high)
            if peer == 0:
                sum_a = a
            else:
                sum_a = sum_a + a
    if ADDS:
        low, high = before.to(tl.int32), (before >> 32).to(tl.int32)
        sum_a, sum_b = sum_a + low_half(low, KIND), sum_b + high_half(low, KIND)
        sum_c, sum_d = sum_c + low_half(high, KIND), sum_d + high_half(high, KIND)
    if KIND == "bfloat16" or KIND == "float16":
        said = as_double_word(joined(sum_a, sum_b, KIND), joined(sum_c, sum_d, KIND))
        tl.store(out + at, said, mask=at < piece)
    elif KIND == "float32":
        said = as_double_word(sum_a.to(tl.int32, bitcast=True), sum_b.to(tl.int32, bitcast=True))
        tl.store(out + at, said, mask=at < piece)
    elif KIND == "int32":
        tl.store(out + at, as_double_word(sum_a, sum_b), mask=at < piece)
    elif KIND == "float64" or KIND == "int64":
        tl.store(out + at, sum_a.to(tl.int64, bitcast=True), mask=at < piece)
    tl.debug_barrier()  # all threads have read the counter
    tl.store(counters + block, number)
