"""Kernels of Triton that bring tokens to their experts and their sums back: see `runtime.ops.experts`.

    localise   index, gates [T, K]            ->  the same for one rank's experts
    count      index [N]                      ->  parts [P, BINS]          how many choices of a part each expert has
    place      index [N], parts               ->  order, position [N], counts, ends [E]
    spread     hidden [T, H], position [N]    ->  rows [N, H]              each token read once, written K times
    invert     order [N]                      ->  position [N]
    combine    rows [N, H], position, gates   ->  [T, H]                   each row read once, no atomics

N = T K. A part is CHUNK choices of one program, taken SUB at a time; a choice's place is the number of choices of
smaller experts, and of its own expert before it: a stable sort in two launches, so that the order is that of the plain
form to the bit. Bin E holds choices of no expert, the bin after it what lies beyond N. Rows of no expert are not
written; their position is -1, and their slot s stands in `order` as -1 - s, so that nobody reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["combine", "count", "invert", "localise", "place", "spread"]


@triton.jit
def localise(
    index, gates, table, owner, copies, out_index, out_gates, num_slots, choices, total, none, rank, most,
    COPIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Table [total + 1]: an expert's place among those of `rank`, or `none`; owner [total + 1, most], copies
    [total + 1]: who has its copies.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_slots
    expert = tl.minimum(tl.load(index + at, mask=inside, other=0).to(tl.int32), total)
    local = tl.load(table + expert, mask=inside, other=0).to(tl.int32)
    if COPIES:
        turn = (at // choices) % tl.load(copies + expert, mask=inside, other=1).to(tl.int32)
        taken = tl.load(owner + expert * most + turn, mask=inside, other=0).to(tl.int32)
        local = tl.where(taken == rank, local, none)
    gate = tl.load(gates + at, mask=inside, other=0)
    tl.store(out_index + at, local.to(out_index.dtype.element_ty), mask=inside)
    tl.store(out_gates + at, tl.where(local < none, gate, tl.zeros_like(gate)), mask=inside)


@triton.jit
def _experts_of(index, at, num_slots, num_experts):
    expert = tl.load(index + at, mask=at < num_slots, other=0)
    expert = tl.minimum(expert, num_experts).to(tl.int32)
    return tl.where(at < num_slots, expert, num_experts + 1)


@triton.jit
def count(
    index, parts, num_slots, num_experts, chunk, BINS: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    lane = tl.arange(0, SUB)
    found = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(part * chunk, part * chunk + chunk, SUB):
        found += tl.histogram(_experts_of(index, start + lane, num_slots, num_experts), BINS)
    tl.store(parts + part * BINS + tl.arange(0, BINS), found)


@triton.jit
def place(
    index, parts, order, position, counts, ends, num_slots, num_experts, chunk, num_parts,
    BINS: tl.constexpr, SUB: tl.constexpr, ROWS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """ALONE: one program, which counts by itself."""
    part = tl.program_id(0)
    lane = tl.arange(0, SUB)
    bins = tl.arange(0, BINS)
    whole = tl.zeros((BINS,), dtype=tl.int32)
    earlier = tl.zeros((BINS,), dtype=tl.int32)
    if ALONE:
        for start in range(0, chunk, SUB):
            whole += tl.histogram(_experts_of(index, start + lane, num_slots, num_experts), BINS)
    else:
        for first in range(0, num_parts, ROWS):
            row = first + tl.arange(0, ROWS)
            found = tl.load(parts + row[:, None] * BINS + bins[None, :], mask=(row < num_parts)[:, None], other=0)
            whole += tl.sum(found, axis=0)
            earlier += tl.sum(tl.where((row < part)[:, None], found, 0), axis=0)
    if part == 0:
        tl.store(counts + bins, whole.to(counts.dtype.element_ty), mask=bins < num_experts)
        tl.store(ends + bins, tl.cumsum(whole, 0).to(ends.dtype.element_ty), mask=bins < num_experts)
    base = tl.cumsum(whole, 0) - whole + earlier
    for start in range(part * chunk, part * chunk + chunk, SUB):
        at = start + lane
        expert = _experts_of(index, at, num_slots, num_experts)
        # of the same expert before it in this piece; the pieces before are in `base`
        is_before = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        to = tl.gather(base, expert, 0) + tl.sum(is_before.to(tl.int32), axis=1)
        inside = at < num_slots
        found = tl.where(expert < num_experts, to, -1)
        tl.store(position + at, found.to(position.dtype.element_ty), mask=inside)
        slot = tl.where(expert < num_experts, at, -1 - at)
        tl.store(order + to, slot.to(order.dtype.element_ty), mask=inside)
        base += tl.histogram(expert, BINS)


@triton.jit
def spread(
    hidden, position, rows, width, stride, CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program: one token's columns, for all of its choices that are of an expert."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(hidden + token.to(tl.int64) * stride + column, mask=inside)
    for choice in tl.static_range(CHOICES):
        to = tl.load(position + token * CHOICES + choice).to(tl.int64)
        tl.store(rows + to * width + column, value, mask=inside & (to >= 0))


@triton.jit
def invert(order, position, num_slots, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(order + at, mask=at < num_slots, other=0)
    tl.store(position + tl.where(slot < 0, -1 - slot, slot), tl.where(slot < 0, -1, at), mask=at < num_slots)


@triton.jit
def combine(
    rows, position, gates, out, width, CHOICES: tl.constexpr, GATED: tl.constexpr, SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What stands nowhere, at -1, is not read. GATED: weighted."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=SUM)
    for choice in tl.static_range(CHOICES):
        slot = token * CHOICES + choice
        row = tl.load(position + slot).to(tl.int64)
        value = tl.load(rows + row * width + column, mask=inside & (row >= 0), other=0)
        weighted = value.to(SUM)
        if GATED:
            weighted *= tl.load(gates + slot).to(SUM)
        total += tl.where(row >= 0, weighted, 0)
    tl.store(out + token.to(tl.int64) * width + column, total.to(out.dtype.element_ty), mask=inside)
