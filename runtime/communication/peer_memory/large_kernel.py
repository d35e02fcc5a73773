"""What every rank's GPU runs: pieces pushed into the others' memory, and what they pushed into ours taken from there.

    small   every 64-bit word that is pushed holds 32 bits of data and the number of the call: what has come says so
            by itself, and one way over the link is all the waiting ("LL" of NCCL)
    large   chunks of a block's own, then a flag for each; four slots take turns, one is pushed while another is awaited

Which peers get what:

    all_reduce      everybody all of x            summed in order of coordinate, so that all get the same bits
    all_gather      everybody this rank's piece   laid side by side
    reduce_scatter  each its piece of x           summed
    all_to_all      each its piece of x           laid side by side; `large` takes counts from the device as well
    permute         one all of x, others nothing  that of the one

A block has memory, flags and a counter of its own, the same on all ranks: it waits for the same block of the others
only, and no block for the whole call. A slot is written again when the peer is known to have read it: `small` has
two, because to have a peer's part of call c it must have begun c, and so have ended c - 1; `large` has four, because
a peer that has pushed chunk c has read all up to c - 2.
The counters are on the device, so that a captured call is a new call whenever it is replayed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.communication.peer_memory.signals import await_flag, raise_flag

__all__ = ["large", "summed_as"]


@triton.jit
def _length_of(peer: tl.constexpr, total, piece):
    """Of the piece of one rank, of pieces that cover `total`: the last ones may be shorter, or empty."""
    return tl.minimum(tl.maximum(total - peer * piece, 0), piece)


@triton.jit
def _before(counts, peer: tl.constexpr, width):
    """Elements that stand before the piece of one rank, and its own; `counts`: rows of `width`."""
    start = 0
    for earlier in tl.static_range(peer):
        start += tl.load(counts + earlier) * width
    return start, tl.load(counts + peer) * width


@triton.jit
def _sent(
    counts,
    total,
    piece,
    PEER: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    SPREADS: tl.constexpr,
    SUMS: tl.constexpr,
    SHIFT: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Where in x the piece for PEER stands, and how long it is."""
    start = 0
    length = total
    if COUNTED:
        start, length = _before(counts, PEER, piece)
    elif SPREADS:
        start = PEER * piece
        length = _length_of(PEER, total, piece)
    elif SHIFT != 0:
        if PEER != (RANK + SHIFT) % RANKS:
            length = 0
    elif not SUMS:
        length = _length_of(RANK, total, piece)
    return start, length


@triton.jit
def _rounds(longest, block, blocks, CHUNK: tl.constexpr):
    """How many chunks of `longest` elements are this block's, of so many that run."""
    return tl.maximum((tl.cdiv(longest, CHUNK) - block + blocks - 1) // blocks, 0)


@triton.jit
def _counted_rounds(sent, received, peer: tl.constexpr, width, block, blocks, CHUNK: tl.constexpr):
    """The same between two ranks, which know both of their counts."""
    longest = tl.maximum(tl.load(sent + peer), tl.load(received + peer)) * width
    return _rounds(longest, block, blocks, CHUNK).to(tl.int32)


@triton.jit
def large(
    x,
    out,
    table,
    counters,
    late,
    abandoned,
    patience_ns,
    total,
    piece,
    sent_counts,
    received_counts,
    start_of_data,
    start_of_flags,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    SPREADS: tl.constexpr,
    SUMS: tl.constexpr,
    SHIFT: tl.constexpr,
    COUNTED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
    KIND: tl.constexpr,
):
    """`total`, `piece`: elements; COUNTED: the counts are rows of `piece` elements each. KIND: sums are of this.

    BLOCKS: how many there is memory for; so many run as programs are launched, as many on all ranks of a call.
    """
    element = x.dtype.element_ty
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    lane = tl.arange(0, CHUNK)
    own_area = tl.load(table + RANK)
    area = 4 * BLOCKS * CHUNK_BYTES
    rounds = _rounds(piece, block, blocks, CHUNK)
    if COUNTED:
        rounds = 0
        for other in tl.static_range(RANKS):
            counted = _counted_rounds(sent_counts, received_counts, other, piece, block, blocks, CHUNK)
            rounds = tl.maximum(rounds, counted)
    for turn in range(rounds + 1):
        # push a chunk to every peer
        if turn < rounds:
            chunk = turn * blocks + block
            at = chunk * CHUNK + lane
            for step in tl.static_range(1, RANKS):
                peer = (RANK + step) % RANKS
                start, length = _sent(
                    sent_counts, total, piece, (RANK + step) % RANKS, RANK, RANKS, SPREADS, SUMS, SHIFT, COUNTED
                )
                number = tl.load(counters + peer * BLOCKS + block) + turn + 1
                base = tl.load(table + peer)
                slot = base + start_of_data + RANK * area + ((number & 3) * BLOCKS + block).to(tl.int64) * CHUNK_BYTES
                to = tl.multiple_of(slot.to(tl.pointer_type(element)), 16)
                mask = at < length
                tl.store(to + lane, tl.load(x + start + at, mask=mask), mask=mask)
                tl.debug_barrier()
                flag = base + start_of_flags + (RANK * BLOCKS + block) * 4
                if COUNTED:
                    longest = tl.maximum(tl.load(sent_counts + peer), tl.load(received_counts + peer)) * piece
                    if turn < _rounds(longest, block, blocks, CHUNK):
                        raise_flag(flag, number)
                else:
                    raise_flag(flag, number)
        # take the chunk before it from every peer
        if turn > 0:
            chunk = (turn - 1) * blocks + block
            at = chunk * CHUNK + lane
            for peer in tl.static_range(RANKS):
                if peer != RANK:
                    number = tl.load(counters + peer * BLOCKS + block) + turn
                    flag = own_area + start_of_flags + (peer * BLOCKS + block) * 4
                    if COUNTED:
                        if turn <= _counted_rounds(sent_counts, received_counts, peer, piece, block, blocks, CHUNK):
                            await_flag(flag, number, late + 4 * peer, abandoned, patience_ns)
                    else:
                        await_flag(flag, number, late + 4 * peer, abandoned, patience_ns)
            tl.debug_barrier()
            for peer in tl.static_range(RANKS):
                start = 0
                length = total
                if COUNTED:
                    start, length = _before(received_counts, peer, piece)
                elif SUMS:
                    if SPREADS:
                        length = _length_of(RANK, total, piece)
                elif SHIFT == 0:
                    start, length = peer * piece, _length_of(peer, total, piece)
                mask = at < length
                if peer == RANK:
                    mine = 0
                    if COUNTED:
                        mine, _ = _before(sent_counts, RANK, piece)
                    elif SPREADS:
                        mine = RANK * piece
                    value = tl.load(x + mine + at, mask=mask)
                else:
                    number = tl.load(counters + peer * BLOCKS + block) + turn
                    inside = ((number & 3) * BLOCKS + block).to(tl.int64) * CHUNK_BYTES
                    slot = own_area + start_of_data + peer * area + inside
                    came = tl.multiple_of(slot.to(tl.pointer_type(element)), 16)
                    value = tl.load(came + lane, mask=mask, cache_modifier=".cg")
                if SUMS:
                    if peer == 0:
                        added = value.to(KIND)
                    else:
                        added += value.to(KIND)
                elif SHIFT == 0:
                    tl.store(out + start + at, value, mask=mask)
                else:
                    if peer == (RANK - SHIFT) % RANKS:
                        tl.store(out + at, value, mask=mask)
            if SUMS:
                tl.store(out + at, added.to(element), mask=mask)
            tl.debug_barrier()  # all have read it before the next flag says so
    tl.debug_barrier()
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            place = counters + peer * BLOCKS + block
            if COUNTED:
                turns = _counted_rounds(sent_counts, received_counts, peer, piece, block, blocks, CHUNK)
                tl.store(place, tl.load(place) + turns)
            else:
                tl.store(place, tl.load(place) + rounds)


_SUMMED = {"float64": tl.float64, "float32": tl.float32, "bfloat16": tl.float32, "float16": tl.float32}


def summed_as(dtype):
    """What sums are taken in; whole numbers in themselves."""
    name = str(dtype).removeprefix("torch.")
    return _SUMMED[name] if name in _SUMMED else getattr(tl, name)
