"""The kernels of `likeliest_tokens.py`; Triton.

largest     a program takes `PIECE` columns of a row; the one that comes last puts together what all of a row have found
best        one program takes what all ranks have found
advance     one program takes all rows

A logit and its column are one number of 64 bits, so that the largest is found by one maximum: the logit's bits in their
order above, and below the column, of which the first one counts. What is no number is above all numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["advance", "best", "largest"]


@triton.jit
def _wait(EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def largest(
    logits, tokens, found, counters, message, columns, row_stride,
    PIECE: tl.constexpr, PIECES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Logits [B, columns], tokens [columns], found [B, PIECES] int64; message [B, 2] float64: a logit and its token."""
    _wait(EARLY)
    row, piece = tl.program_id(0), tl.program_id(1)
    column = piece * PIECE + tl.arange(0, PIECE)
    logit = tl.load(logits + row.to(tl.int64) * row_stride + column, mask=column < columns, other=float("-inf"))
    logit = logit.to(tl.float32) + 0.0  # one zero
    bits = logit.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(logit != logit, 0x7FFFFFFF, order)
    key = (order.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
    top = tl.max(tl.where(column < columns, key, -0x7FFFFFFFFFFFFFFF), axis=0)
    tl.store(found + row * PIECES + piece, top)
    tl.debug_barrier()
    came = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu")
    if came == PIECES - 1:
        whole = tl.max(tl.load(found + row * PIECES + tl.arange(0, PIECES), cache_modifier=".cg"), axis=0)
        first = 0x7FFFFFFF - (whole & 0x7FFFFFFF).to(tl.int32)
        above = (whole >> 32).to(tl.int32)
        above = tl.where(above < 0, above ^ 0x7FFFFFFF, above)
        tl.store(message + 2 * row, above.to(tl.float32, bitcast=True).to(tl.float64))
        tl.store(message + 2 * row + 1, tl.load(tokens + first).to(tl.float64))
        tl.store(counters + row, 0)


@triton.jit(do_not_specialize=["rows"])
def best(
    messages, told, rows, RANKS: tl.constexpr, RANKS_PADDED: tl.constexpr, ROWS_PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Messages [RANKS, rows, 2]; told [4, rows]: tokens, logits, 1, 0. Of equal logits the lowest token."""
    _wait(EARLY)
    rank, row = tl.arange(0, RANKS_PADDED), tl.arange(0, ROWS_PADDED)
    there = (rank < RANKS)[:, None] & (row < rows)[None, :]
    at = messages + (rank[:, None] * rows + row[None, :]) * 2
    logits = tl.load(at, mask=there, other=float("-inf"))
    tokens = tl.load(at + 1, mask=there, other=float("inf"))
    is_none = tl.max((logits != logits).to(tl.int32), axis=0) == 1
    top = tl.max(tl.where(logits != logits, float("-inf"), logits), axis=0)
    token = tl.min(tl.where((logits < top[None, :]) & ~is_none[None, :], float("inf"), tokens), axis=0)
    live = row < rows
    tl.store(told + row, token, mask=live)
    tl.store(told + rows + row, tl.where(is_none, float("nan"), top), mask=live)
    tl.store(told + 2 * rows + row, row.to(tl.float64) * 0.0 + 1.0, mask=live)
    tl.store(told + 3 * rows + row, row.to(tl.float64) * 0.0, mask=live)


@triton.jit(do_not_specialize=["rows"])
def advance(told, ids, positions, steps, rows, ROWS_PADDED: tl.constexpr):
    """Ids [rows] become the tokens that were told; positions and steps [rows] are one further."""
    row = tl.arange(0, ROWS_PADDED)
    live = row < rows
    tl.store(ids + row, tl.load(told + row, mask=live, other=0.0).to(tl.int64), mask=live)
    tl.store(positions + row, tl.load(positions + row, mask=live, other=0) + 1, mask=live)
    tl.store(steps + row, tl.load(steps + row, mask=live, other=0) + 1, mask=live)
