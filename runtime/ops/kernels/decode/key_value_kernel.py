"""Attention of one new token per row to the tokens in a cache, in one kernel of Triton; see `decode_attention`.

Each program takes one kv head of one row, with all query heads that share it, and one of `SPLITS` parts of the keys
that the row has: what lies behind its length is not read. The one that comes last puts the parts together by their
log-sum-exp (flash decoding: arXiv:2311.01282). Everything that depends on the length is read on the device.

A cache of float8 is read as it lies: codes, which the products take as numbers of the query's dtype, and scales of
blocks of 128 numbers. Where a head is one block, its scale multiplies a score, or goes into a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.ops.kernels.decode.float8_kernel import largest_of, numbers_of, scale_of, to_codes

__all__ = ["decode"]


@triton.jit
def decode(
    q,
    new_key,
    new_value,
    positions,
    keys,
    values,
    key_scales,
    value_scales,
    sinks,
    cos,
    sin,
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
    key_scale_row,
    key_scale_head,
    value_scale_row,
    value_scale_head,
    cos_row,
    sin_row,
    HALF: tl.constexpr,
    EARLY: tl.constexpr,
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
    KEY_SCALES: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    FOLDED: tl.constexpr,
    PTX: tl.constexpr,
):
    """`scale` is that of the scores times log2(e), or without it where they are CAPPED.

    BLOCK: how many slots lie together, where `table` says of each BLOCK of a row which block of the cache it is, and
    `key_row` is from block to block; 0: a row's slots are its own. MERGED: parts that are read at a time at the end.
    HALF: query and key become x * cos + roll(x, -HALF) * sin; 0: they have. EARLY: whether it was launched before its
    predecessor's end. KEY_SCALES: how many of a key, which is codes of float8 then; 0: keys are numbers. VALUE_SCALES
    alike. FOLDED: whether a value's one scale goes into the weights, whose dtype has room for that. PTX: not
    interpreted.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
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
    if HALF != 0:
        turned = (dims + HALF) % D
        straight = tl.load(cos + row * cos_row + dims, mask=dims < D, other=0.0).to(tl.float32)
        across = tl.load(sin + row * sin_row + dims, mask=dims < D, other=0.0).to(tl.float32)
        other_half = tl.load(
            q + query_at[:, None] * D + turned[None, :], mask=(heads[:, None] < GROUP) & (dims[None, :] < D), other=0.0
        )
        query = (query.to(tl.float32) * straight[None, :] + other_half.to(tl.float32) * across[None, :]).to(query.dtype)
        other_key = tl.load(new_key + pair * D + turned, mask=dims < D, other=0.0)
        key = (key.to(tl.float32) * straight + other_key.to(tl.float32) * across).to(key.dtype)
    if KEY_SCALES:
        key_block, key_sizes = dims // 128, dims * 0.0 + 1.0
        for number in tl.static_range(KEY_SCALES):
            key_sizes = tl.where(key_block == number, scale_of(largest_of(key, key_block, number)), key_sizes)
        key_codes = to_codes(key, key_sizes)
        key = numbers_of(key_codes, tl.float32, PTX) * key_sizes
    if VALUE_SCALES:
        value_block, value_sizes = value_dims // 128, value_dims * 0.0 + 1.0
        for number in tl.static_range(VALUE_SCALES):
            value_sizes = tl.where(value_block == number, scale_of(largest_of(value, value_block, number)), value_sizes)
        value_codes = to_codes(value, value_sizes)
        value = numbers_of(value_codes, tl.float32, PTX) * value_sizes
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
        if KEY_SCALES:
            key_scales += head.to(tl.int64) * key_scale_head
        if VALUE_SCALES:
            value_scales += head.to(tl.int64) * value_scale_head
        if BLOCK == 0:
            keys += row.to(tl.int64) * key_row
            values += row.to(tl.int64) * value_row
            if KEY_SCALES:
                key_scales += row.to(tl.int64) * key_scale_row
            if VALUE_SCALES:
                value_scales += row.to(tl.int64) * value_scale_row
        else:
            table += row.to(tl.int64) * table_row
        if split == 0:
            if BLOCK == 0:
                own_keys, own_values = keys + at * D, values + at * DV
            else:
                block_of = tl.load(table + at // BLOCK).to(tl.int64)
                own_keys = keys + block_of * key_row + at % BLOCK * D
                own_values = values + block_of * value_row + at % BLOCK * DV
            if KEY_SCALES:
                tl.store(own_keys + dims, key_codes, mask=dims < D)
                own_scales = key_scales + (at * KEY_SCALES if BLOCK == 0 else 0)
                if BLOCK:
                    own_scales += block_of * key_scale_row + at % BLOCK * KEY_SCALES
                # all numbers of a block have its scale, and the first of them keeps it
                tl.store(own_scales + key_block, key_sizes, mask=(dims % 128 == 0) & (dims < D))
            else:
                tl.store(own_keys + dims, key, mask=dims < D)
            if VALUE_SCALES:
                tl.store(own_values + value_dims, value_codes, mask=value_dims < DV)
                own_scales = value_scales + (at * VALUE_SCALES if BLOCK == 0 else 0)
                if BLOCK:
                    own_scales += block_of * value_scale_row + at % BLOCK * VALUE_SCALES
                tl.store(own_scales + value_block, value_sizes, mask=(value_dims % 128 == 0) & (value_dims < DV))
            else:
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
                key_scale_at, value_scale_at = slot * KEY_SCALES, slot * VALUE_SCALES
            else:
                blocks = tl.load(table + slot // BLOCK, mask=seen, other=0).to(tl.int64)
                key_at = blocks * key_row + slot % BLOCK * D
                value_at = blocks * value_row + slot % BLOCK * DV
                key_scale_at = blocks * key_scale_row + slot % BLOCK * KEY_SCALES
                value_scale_at = blocks * value_scale_row + slot % BLOCK * VALUE_SCALES
            block = tl.load(keys + key_at[None, :] + dims[:, None], mask=seen[None, :] & (dims[:, None] < D), other=0.0)
            if KEY_SCALES:
                block = numbers_of(block, query.dtype, PTX)
            if KEY_SCALES > 1:
                sizes = tl.load(
                    key_scales + key_scale_at[None, :] + (dims // 128)[:, None],
                    mask=seen[None, :] & (dims[:, None] < D),
                    other=0.0,
                )
                block = block.to(tl.float32) * sizes
            if EXACT:
                scores = tl.dot(query, block.to(query.dtype), input_precision="ieee") * scale
            else:
                scores = tl.dot(query, block.to(query.dtype)) * scale
            if KEY_SCALES == 1:
                scores *= tl.load(key_scales + key_scale_at, mask=seen, other=0.0)[None, :]
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
            if VALUE_SCALES:
                block = numbers_of(block, query.dtype, PTX)
            if VALUE_SCALES == 1 and FOLDED:
                weights *= tl.load(value_scales + value_scale_at, mask=seen, other=0.0)[None, :]
            elif VALUE_SCALES:
                sizes = tl.load(
                    value_scales + value_scale_at[:, None] + (value_dims // 128)[None, :],
                    mask=seen[:, None] & (value_dims[None, :] < DV),
                    other=0.0,
                )
                block = block.to(tl.float32) * sizes
            if EXACT:
                added = tl.dot(weights, block.to(tl.float32), input_precision="ieee")
            else:
                added = tl.dot(weights.to(query.dtype), block.to(query.dtype))
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
