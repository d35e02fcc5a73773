"""Rows of tensors written to where they belong, in this GPU's memory and in others': one kernel, no copy before it.

    moves[M, 13]   int64: source, head, rank, where it starts in that rank's memory, bytes between its batches and rows,
                   rows, the first of the second run, then what a row's number is moved by where it is read and where it
                   is written, of the first run and of the second; and how many 4-byte words a row has
    sources        up to three tensors [B, H, S, D], by address, with their strides in bytes

A program takes `ROWS` rows of a move of a batch, then the next ones that are its own. Who reads them waits for a flag
that is raised behind this kernel (`large_kernel.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FIELDS", "write_rows"]

FIELDS = 13


@triton.jit
def write_rows(
    moves,
    starts,
    own_start,
    first,
    first_batch,
    first_head,
    first_row,
    second,
    second_batch,
    second_head,
    second_row,
    third,
    third_batch,
    third_head,
    third_row,
    items,
    batches,
    tiles,
    RANK: tl.constexpr,
    FIELDS: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """starts: of all ranks' memory; own_start: of what is written here. WORDS: of a row, or more. tiles: of a move."""
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        tile = item % tiles
        batch = (item // tiles % batches).to(tl.int64)
        move = moves + (item // tiles // batches) * FIELDS
        source = tl.load(move)
        head = tl.load(move + 1)
        rank = tl.load(move + 2)
        rows = tl.load(move + 6)
        row = tile * ROWS + tl.arange(0, ROWS)
        is_second = row >= tl.load(move + 7)
        read = (row + tl.where(is_second, tl.load(move + 9), tl.load(move + 8))).to(tl.int64)
        written = (row + tl.where(is_second, tl.load(move + 11), tl.load(move + 10))).to(tl.int64)
        if source == 0:
            start = first + batch * first_batch + head * first_head
            between = first_row + tl.zeros_like(head)
        elif source == 1:
            start = second + batch * second_batch + head * second_head
            between = second_row + tl.zeros_like(head)
        else:
            start = third + batch * third_batch + head * third_head
            between = third_row + tl.zeros_like(head)
        base = tl.load(starts + rank)
        if rank == RANK:
            base = own_start + tl.zeros_like(base)
        base += tl.load(move + 3) + batch * tl.load(move + 4)
        column = tl.arange(0, WORDS)
        words = tl.multiple_of(tl.load(move + 12).to(tl.int32), 4)
        mask = (row < rows)[:, None] & (column < words)[None, :]
        from_row = (start + read * between).to(tl.pointer_type(tl.int32))
        to_row = (base + written * tl.load(move + 5)).to(tl.pointer_type(tl.int32))
        from_row = tl.multiple_of(from_row, 16)
        to_row = tl.multiple_of(to_row, 16)
        value = tl.load(from_row[:, None] + column[None, :], mask=mask)
        tl.store(to_row[:, None] + column[None, :], value, mask=mask)
