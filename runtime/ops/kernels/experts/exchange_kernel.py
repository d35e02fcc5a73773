"""Kernels of Triton around an all-to-all of tokens: see `runtime.ops.expert_exchange`.

    route    index [T, K]                          ->  ranks, local [T, n] and [T, K]    who gets a token, and as what
    pack     hidden [T, H], local, gates, position ->  messages [M, W bytes]             one for each token and rank
    unpack   messages [R, W bytes]                 ->  index, gates [R, K]

A message is a token's row, then its K choices as int32, then their gates; each of the three begins at a multiple of 16
bytes, and so does the next message. Position [T, n]: which message is a token's for a rank, -1 for none.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["pack", "route", "unpack"]


@triton.jit
def route(
    index, local, owner, copies, ranks, owners, places, num_tokens, total, most, own, own_held,
    RANKS: tl.constexpr, CHOICES: tl.constexpr, COPIES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """`local` [n, total + 1]: an expert's place among those of a rank; owner, copies:
    see `localise`. ranks [T, n]: r where r gets the token, n where not. owners, places [T, K]: whose copy of each
    choice is taken, and where that one has it.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = token < num_tokens
    for r in tl.static_range(RANKS):
        is_wanted = tl.zeros((TOKENS,), dtype=tl.int32)
        for choice in tl.static_range(CHOICES):
            slot = token * CHOICES + choice
            expert = tl.minimum(tl.load(index + slot, mask=inside, other=0).to(tl.int32), total)
            if COPIES:
                turn = (token + own) % tl.load(copies + expert, mask=inside, other=1).to(tl.int32)
                taken = tl.load(owner + expert * most + turn, mask=inside, other=RANKS).to(tl.int32)
                mine = tl.load(local + own * (total + 1) + expert, mask=inside, other=0).to(tl.int32)
                taken = tl.where(mine < own_held, own, taken)
            else:
                taken = tl.load(owner + expert * most, mask=inside, other=RANKS).to(tl.int32)
            if r == 0:
                at = tl.minimum(taken, RANKS - 1) * (total + 1) + expert
                tl.store(owners + slot, taken, mask=inside)
                tl.store(places + slot, tl.load(local + at, mask=inside, other=0).to(tl.int32), mask=inside)
            is_wanted |= (taken == r).to(tl.int32)
        tl.store(ranks + token * RANKS + r, tl.where(is_wanted > 0, r, RANKS), mask=inside)


@triton.jit
def pack(
    hidden, gates, owners, places, position, held, messages, width, stride, gate_stride, row_bytes, start_of_index,
    start_of_gates, RANKS: tl.constexpr, CHOICES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: some of a token's columns for all ranks that get it; the first one of a token its choices too."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(hidden + token.to(tl.int64) * stride + column, mask=column < width)
    lane = tl.arange(0, LANES)
    is_first = (lane < CHOICES) & (tl.program_id(1) == 0)
    taken = tl.load(owners + token * CHOICES + lane, mask=is_first, other=RANKS)
    place = tl.load(places + token * CHOICES + lane, mask=is_first, other=0)
    gate = tl.load(gates + token.to(tl.int64) * gate_stride + lane, mask=is_first, other=0)
    for r in tl.static_range(RANKS):
        at = tl.load(position + token * RANKS + r).to(tl.int64)
        start = messages + at * row_bytes
        to = tl.multiple_of(start.to(tl.pointer_type(hidden.dtype.element_ty)), 16)
        tl.store(to + column, value, mask=(column < width) & (at >= 0))
        none = tl.load(held + r).to(tl.int32)
        to_index = (start + start_of_index).to(tl.pointer_type(tl.int32))
        tl.store(to_index + lane, tl.where(taken == r, place, none), mask=is_first & (at >= 0))
        to_gates = (start + start_of_gates).to(tl.pointer_type(gates.dtype.element_ty))
        tl.store(to_gates + lane, tl.where(taken == r, gate, tl.zeros_like(gate)), mask=is_first & (at >= 0))


@triton.jit
def unpack(
    messages, counts, index, gates, num_slots, none, row_bytes, start_of_index, start_of_gates,
    RANKS: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts [n]: how many messages came from each; what lies behind them is of no expert."""
    came = 0
    for r in tl.static_range(RANKS):
        came += tl.load(counts + r).to(tl.int32)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = slot // CHOICES
    start = messages + row.to(tl.int64) * row_bytes
    choice = slot % CHOICES
    is_there = (slot < num_slots) & (row < came)
    from_index = (start + start_of_index).to(tl.pointer_type(tl.int32))
    from_gates = (start + start_of_gates).to(tl.pointer_type(gates.dtype.element_ty))
    place = tl.load(from_index + choice, mask=is_there, other=0)
    place = tl.where(is_there, place, none)
    gate = tl.load(from_gates + choice, mask=is_there, other=0)
    tl.store(index + slot, place.to(index.dtype.element_ty), mask=slot < num_slots)
    tl.store(gates + slot, gate, mask=slot < num_slots)
