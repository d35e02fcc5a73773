"""How a product's partial sums reach the product behind it on all ranks, so that no all-reduce stands between them.

Memory that waits for a number holds ones in all bits, which no rounded number does: what has come says so by itself,
and one way over the link is all the waiting. Each rank adds the parts in order of coordinate, so that all get the same
bits. A call has one of `SLOTS` parts of the memory, by its number; the parts of ranks stand behind each other in it.

    call c       pushed: into slot c; pulled: slot c is read by all programs, then slot c - 1 is cleared
    calls        int64 [4]: calls that were pulled, and pushed, by this rank; words in slot c, of even and odd c

Two slots would not do. A rank that has all parts of call c + 1 knows that the others have pulled call c, and cleared
slot c - 1: so it may push call c + 2 there, while they may still read slot c + 1, and have slot c to clear. Numbers are
counted on the device, so that a captured call is a new one whenever it is replayed. Which kernel counts what when
nobody reads it: a rank pushes and pulls in turn, and each such kernel waits for the end of the one before.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["SLOTS", "begin_pulling", "begin_pushing", "clear_last", "pull", "push"]

SLOTS = 3
_SLOTS = tl.constexpr(SLOTS)
_WORDS = tl.constexpr(512)
"""That a program clears at a time."""


_FOUR_UNITS = tl.constexpr(
    """
    {
        .reg .pred came, tries, over;
        .reg .b32 tried, few, waits, part;
        .reg .b32 a<4>, b<4>, c<4>, d<4>;
        .reg .b64 since, now;
        mov.u32 tried, 0;
        mov.u64 since, %globaltimer;
    units_again:
        ld.relaxed.sys.global.v4.b32 {a0, a1, a2, a3}, [$4];
        ld.relaxed.sys.global.v4.b32 {b0, b1, b2, b3}, [$5];
        ld.relaxed.sys.global.v4.b32 {c0, c1, c2, c3}, [$6];
        ld.relaxed.sys.global.v4.b32 {d0, d1, d2, d3}, [$7];
        mov.u32 waits, 0;
    """
    + "".join(
        f"""
        not.b32 part, {unit}{word};
        sub.u32 part, part, $8;
        and.b32 part, part, {unit}{word};
        or.b32 waits, waits, part;
        """
        for unit in "abcd"
        for word in range(4)
    )
    + """
        and.b32 waits, waits, $12;
        setp.eq.u32 came, waits, 0;
        @came bra units_done;
        add.u32 tried, tried, 1;
        and.b32 few, tried, 16383;
        setp.ne.u32 tries, few, 0;
        @tries bra units_again;
        mov.u64 now, %globaltimer;
        sub.u64 now, now, since;
        setp.gt.u64 over, now, $24;
        @over st.relaxed.sys.global.u32 [$16], 1;
        ld.relaxed.sys.global.u32 few, [$20];
        setp.ne.u32 over, few, 0;
        @!over bra units_again;
    units_done:
        mov.u32 $0, 0;
        mov.u32 $1, 0;
        mov.u32 $2, 0;
        mov.u32 $3, 0;
    }
    """
)
"""Waits for units; the others of its operands: `ones`, `tops`, `late`, `abandoned`, `patience_ns`, four of each."""


@triton.jit
def await_units(address, ones, tops, late, abandoned, patience_ns):
    """Until 16 bytes at each address have come. Four of each thread at a time: their loads are under way together.

    ones: 1 in each number of 32 bits; tops: the highest bit of each. See `signals.py` for the others.
    """
    tl.inline_asm_elementwise(
        _FOUR_UNITS,
        "=r,=r,=r,=r,l,l,l,l,r,r,r,r,r,r,r,r,l,l,l,l,l,l,l,l,l,l,l,l",
        [address, ones, tops, late, abandoned, tl.cast(patience_ns, tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=4,
    )


@triton.jit
def begin_pushing(calls, program):
    """The number of this call."""
    number = tl.load(calls) + 1
    if program == 0:
        tl.store(calls + 1, number)
    return number


@triton.jit
def begin_pulling(calls, program):
    number = tl.load(calls + 1)
    if program == 0:
        tl.store(calls, number)
    return number


@triton.jit
def _slot(table, number, start, part, size: tl.constexpr, rank, RANKS: tl.constexpr):
    """Where the first part of a call stands in a rank's memory."""
    return tl.load(table + rank) + start + (number % _SLOTS * RANKS).to(tl.int64) * part * size


@triton.jit
def push(y, x, table, number, start, part, at, ok, RANK: tl.constexpr, RANKS: tl.constexpr):
    """`y`, rounded to what x holds, into this rank's part on all ranks; the others' first."""
    element = x.dtype.element_ty
    size: tl.constexpr = element.primitive_bitwidth // 8
    if size == 4:
        bits = y.to(element).to(tl.int32, bitcast=True)
        bits = tl.where(bits == -1, 2147483647, bits)  # what is no number is so in other bits
    else:
        bits = y.to(element).to(tl.int16, bitcast=True)
        bits = tl.where(bits == -1, tl.full((), 32767, tl.int16), bits)
    for step in tl.static_range(1, RANKS + 1):
        peer = (RANK + step) % RANKS
        to = _slot(table, number, start, part, size, peer, RANKS).to(tl.pointer_type(bits.dtype))
        tl.store(tl.multiple_of(to, 16) + RANK * part + at, bits, mask=ok)


@triton.jit
def pull(
    x, table, number, late, abandoned, patience_ns, start, part, numel,
    RANK: tl.constexpr, RANKS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Where the parts are, as what x holds, once all have come. UNITS: of 16 bytes at a time, four for each thread."""
    element = x.dtype.element_ty
    size: tl.constexpr = element.primitive_bitwidth // 8
    slot = _slot(table, number, start, part, size, RANK, RANKS)
    units = numel * size // 16
    for step in tl.static_range(1, RANKS):  # this rank's own has come before this kernel
        peer = (RANK + step) % RANKS
        for first in range(0, units, UNITS):
            unit = tl.minimum(first + tl.arange(0, UNITS), units - 1)
            await_units(
                slot + peer * part * size + unit.to(tl.int64) * 16,
                tl.full((), 1 if size == 4 else 65537, tl.int32),
                tl.full((), -2147483648 if size == 4 else -2147450880, tl.int32),
                late + 4 * peer,
                abandoned,
                patience_ns,
            )
    tl.debug_barrier()
    return tl.multiple_of(slot.to(tl.pointer_type(element)), 16)


@triton.jit
def clear_last(
    x, table, calls, number, start, part, numel, program, RANK: tl.constexpr, RANKS: tl.constexpr
):  # fmt: skip
    """What the call before has brought, which all programs have read; they share the work."""
    size: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    last = _slot(table, number + _SLOTS - 1, start, part, size, RANK, RANKS)
    words = tl.load(calls + 2 + ((number + 1) & 1))
    for first in range(program * _WORDS, words, tl.num_programs(0) * _WORDS):
        word = first + tl.arange(0, _WORDS)
        for rank in tl.static_range(RANKS):
            to = (last + rank * part * size).to(tl.pointer_type(tl.int32))
            tl.store(to + word, tl.full((_WORDS,), -1, tl.int32), mask=word < words)
    if program == 0:
        tl.store(calls + 2 + (number & 1), numel * size // 4)
