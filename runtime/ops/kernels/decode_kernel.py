"""Attention of one new token per row to the tokens in a cache, in one kernel of Triton; see `decode_attention`.

Each program takes one kv head of one row, with all query heads that share it, and one of `SPLITS` parts of the keys
that the row has: what lies behind its length is not read. The one that comes last puts the parts together by their
log-sum-exp (flash decoding: arXiv:2311.01282). Everything that depends on the length is read on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["decode"]


@triton.jit
def decode(
    q,
    new_key,
    new_value,
    positions,
    keys,
    values,
    sinks,
    out,
    lse,
    parts,
    tops,
    sums,
    counters,
    table,
    scale,
    softcap,
    window,
    chunk,
    slots,
    least_tiles,
    table_row,
    key_row,
    key_head,
    value_row,
    value_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    DV: tl.constexpr,
    DV_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP_MERGED: tl.constexpr,
    MERGED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`scale` is that of the scores times log2(e), or without it where they are CAPPED.

    BLOCK: how many slots lie together, where `table` says of each BLOCK of a row which block of the cache it is, and
    `key_row` is from block to block; 0: a row's slots are its own. MERGED: parts that are read at a time at the end.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    row = pair // KV_HEADS
    head = pair % KV_HEADS
    position = tl.load(positions + row)
    # under way while the position is waited for
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, D_PADDED)
    value_dims = tl.arange(0, DV_PADDED)
    query_at = (row * KV_HEADS + head) * GROUP + heads
    query = tl.load(
        q + query_at[:, None] * D + dims[None, :], mask=(heads[:, None] < GROUP) & (dims[None, :] < D), other=0.0
    )
    key = tl.load(new_key + pair * D + dims, mask=dims < D, other=0.0)
    value = tl.load(new_value + pair * DV + value_dims, mask=value_dims < DV, other=0.0)
    length = position + 1
    wraps = length > slots
    held = tl.minimum(length, slots)
    at = position % slots
    first = position * 0
    if WINDOWED:
        first = tl.maximum(first, length - window)
    if CHUNKED:
        first = tl.maximum(first, position // chunk * chunk)
    first_tile = tl.where(wraps, 0, first // TILE)
    tiles = tl.cdiv(held, TILE)
    each = tl.maximum(tl.cdiv(tiles - first_tile, SPLITS), least_tiles)
    active = tl.cdiv(tiles - first_tile, each)
    if split < active:
        keys += head.to(tl.int64) * key_head
        values += head.to(tl.int64) * value_head
        if BLOCK == 0:
            keys += row.to(tl.int64) * key_row
            values += row.to(tl.int64) * value_row
        else:
            table += row.to(tl.int64) * table_row
        if split == 0:
            if BLOCK == 0:
                own_keys, own_values = keys + at * D, values + at * DV
            else:
                block_of = tl.load(table + at // BLOCK).to(tl.int64)
                own_keys = keys + block_of * key_row + at % BLOCK * D
                own_values = values + block_of * value_row + at % BLOCK * DV
            tl.store(own_keys + dims, key, mask=dims < D)
            tl.store(own_values + value_dims, value, mask=value_dims < DV)
        # the first part has the new token, which nobody reads from the cache
        own = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
        if CAPPED:
            own = _capped(own, softcap)
        top = tl.where(split == 0, own, float("-inf"))
        total = tl.where(split == 0, 1.0, 0.0) + heads * 0.0
        result = tl.where(split == 0, 1.0, 0.0) * value.to(tl.float32)[None, :] + heads[:, None] * 0.0
        start = first_tile + split * each
        for tile in range(start, tl.minimum(start + each, tiles)):
            slot = tile * TILE + tl.arange(0, TILE)
            seen = (slot < held) & (slot != at)
            if WINDOWED or CHUNKED:
                where = tl.where(wraps, position - (position - slot + slots) % slots, slot)
                if WINDOWED:
                    seen = seen & (where > position - window)
                if CHUNKED:
                    seen = seen & (where // chunk == position // chunk)
            if BLOCK == 0:
                key_at, value_at = slot * D, slot * DV
            else:
                blocks = tl.load(table + slot // BLOCK, mask=seen, other=0).to(tl.int64)
                key_at = blocks * key_row + slot % BLOCK * D
                value_at = blocks * value_row + slot % BLOCK * DV
            block = tl.load(keys + key_at[None, :] + dims[:, None], mask=seen[None, :] & (dims[:, None] < D), other=0.0)
            if EXACT:
                scores = tl.dot(query, block, input_precision="ieee") * scale
            else:
                scores = tl.dot(query, block) * scale
            if CAPPED:
                scores = _capped(scores, softcap)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
            shrinks = tl.exp2(top - base)
            total = total * shrinks + tl.sum(weights, axis=1)
            block = tl.load(
                values + value_at[:, None] + value_dims[None, :],
                mask=seen[:, None] & (value_dims[None, :] < DV),
                other=0.0,
            )
            if EXACT:
                added = tl.dot(weights, block, input_precision="ieee")
            else:
                added = tl.dot(weights.to(block.dtype), block)
            result = result * shrinks[:, None] + added
            top = higher
        ours = (heads[:, None] < GROUP) & (value_dims[None, :] < DV)
        if active == 1:
            if SINKS:
                sink = tl.load(sinks + head * GROUP + heads, mask=heads < GROUP, other=0.0).to(tl.float32)
                total += tl.exp2(sink * 1.4426950408889634 - top)
            tl.store(out + query_at[:, None] * DV + value_dims[None, :], result / total[:, None], mask=ours)
            if LSE:
                tl.store(lse + query_at, (top + tl.log2(total)) * 0.6931471805599453, mask=heads < GROUP)
        else:
            part = (pair * SPLITS + split) * GROUP + heads
            tl.store(parts + part[:, None] * DV + value_dims[None, :], result, mask=ours)
            tl.store(tops + part, top, mask=heads < GROUP)
            tl.store(sums + part, total, mask=heads < GROUP)
            tl.debug_barrier()
            came = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
            if came == active - 1:
                member = tl.arange(0, GROUP_MERGED)
                is_member = member < GROUP
                splits = tl.arange(0, SPLITS)
                there = (splits < active)[:, None] & is_member[None, :]
                at_part = (pair * SPLITS + splits)[:, None] * GROUP + member[None, :]
                tops_of = tl.load(tops + at_part, mask=there, other=float("-inf"), cache_modifier=".cg")
                sums_of = tl.load(sums + at_part, mask=there, other=0.0, cache_modifier=".cg")
                highest = tl.max(tops_of, axis=0)
                highest = tl.where(is_member, highest, 0.0)
                whole = tl.sum(sums_of * tl.exp2(tops_of - highest[None, :]), axis=0)
                merged = tl.zeros((GROUP_MERGED, DV_PADDED), dtype=tl.float32)
                for first_part in range(0, active, MERGED):
                    some = first_part + tl.arange(0, MERGED)
                    is_one = (some < active)[:, None] & is_member[None, :]
                    at_some = (pair * SPLITS + some)[:, None] * GROUP + member[None, :]
                    tops_some = tl.load(tops + at_some, mask=is_one, other=float("-inf"), cache_modifier=".cg")
                    results = tl.load(
                        parts + at_some[:, :, None] * DV + value_dims[None, None, :],
                        mask=is_one[:, :, None] & (value_dims[None, None, :] < DV),
                        other=0.0,
                        cache_modifier=".cg",
                    )
                    merged += tl.sum(results * tl.exp2(tops_some - highest[None, :])[:, :, None], axis=0)
                if SINKS:
                    sink = tl.load(sinks + head * GROUP + member, mask=is_member, other=0.0).to(tl.float32)
                    whole += tl.exp2(sink * 1.4426950408889634 - highest)
                place = (row * KV_HEADS + head) * GROUP + member
                tl.store(
                    out + place[:, None] * DV + value_dims[None, :],
                    merged / tl.where(is_member, whole, 1.0)[:, None],
                    mask=is_member[:, None] & (value_dims[None, :] < DV),
                )
                if LSE:
                    tl.store(lse + place, (highest + tl.log2(whole)) * 0.6931471805599453, mask=is_member)
                tl.store(counters + pair, 0)


@triton.jit
def _capped(scores, softcap):
    """Softcap * tanh(scores / softcap), times log2(e)."""
    bent = 2.0 / (1.0 + tl.exp2(-2.8853900817779268 * scores / softcap)) - 1.0
    return bent * softcap * 1.4426950408889634
