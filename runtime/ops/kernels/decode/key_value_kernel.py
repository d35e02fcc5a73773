"""Attention of one new token per row to the tokens in a cache, in one kernel of Triton; see `decode_attention`.

Each program takes one kv head of one row, with all query heads that share it, and one of some parts of the keys
that the row has: what lies behind its length is not read. The one that comes last puts the parts together by their
log-sum-exp (flash decoding: arXiv:2311.01282). Everything that depends on the length is read on the device.

A cache of float8 is read as it lies: codes, which the products take as numbers of the query's dtype, and scales of
blocks of 128 numbers. Where a head is one block, its scale multiplies a score, or goes into a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.ops.kernels.decode.float8_kernel import numbers_of, scale_of, to_codes
from runtime.ops.kernels.decode.key_value_tile_kernel import (
    attended,
    capped,
    in_place,
    keys_of,
    parts_of,
    places_of,
    values_of,
)

__all__ = ["decode"]


# what differs from run to run compiles nothing anew
@triton.jit(do_not_specialize=["ahead", "slots", "table_row"])
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
    is_own,
    scale,
    softcap,
    window,
    chunk,
    slots,
    ahead,
    q_row,
    q_head,
    new_key_row,
    new_key_head,
    new_value_row,
    new_value_head,
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
    SHARED: tl.constexpr,
    PTX: tl.constexpr,
):
    """`scale` is that of the scores times log2(e), or without it where they are CAPPED.

    BLOCK: how many slots lie together, where `table` says of each BLOCK of a row which block of the cache it is, and
    `key_row` is from block to block; 0: a row's slots are its own. MERGED: parts that are read at a time at the end.
    ahead: 1 where positions, table and what is cached were written before the step began, so that they may be read
    while the kernel before this one still runs; otherwise 0. HALF: query and key become x * cos + roll(x, -HALF) * sin;
    0: they have. EARLY: whether it was launched before its predecessor's end. KEY_SCALES: how many of a key, which is
    codes of float8 then; 0: keys are numbers. VALUE_SCALES alike. FOLDED: whether a value's one scale goes into the
    weights, whose dtype has room for that. PTX: not interpreted.

    SHARED: ranks share out the tokens of a row, and `is_own` says whether this one keeps the new one. `positions` are
    how many of the row's tokens it has kept before. `out` is float32, rows of DV + 1 numbers: the last one is the
    log-sum-exp, and where the rank has no token of a row, its numbers are zeros and that is -inf.
    """
    if EARLY:
        gdc_launch_dependents()
        if ahead == 0:
            gdc_wait()
    pair = tl.program_id(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    row = pair // KV_HEADS
    head = pair % KV_HEADS
    position = tl.load(positions + row)
    keeps = split == 0
    if SHARED:
        owns = tl.load(is_own + row) != 0
        keeps = keeps & owns
    heads = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, D_PADDED)
    value_dims = tl.arange(0, DV_PADDED)
    length = position + 1
    if SHARED:
        length = position + owns.to(position.dtype)
    wraps = length > slots
    held = tl.minimum(length, slots)
    at = position % slots
    if SHARED:  # of what is kept, a token of another rank's hides none
        at = tl.where(owns, at, held)
    first = position * 0
    if WINDOWED:
        first = tl.maximum(first, length - window)
    if CHUNKED:
        first = tl.maximum(first, position // chunk * chunk)
    first_tile = tl.where(wraps, 0, first // TILE)
    tiles = tl.cdiv(held, TILE)
    each = tl.cdiv(tiles - first_tile, splits)
    if SHARED:  # of no token too, one program says so
        each = tl.maximum(each, 1)
    active = tl.cdiv(tiles - first_tile, each)
    if SHARED:
        active = tl.maximum(active, 1)
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
        start = first_tile + split * each
        # the first tile is under way while the kernel before is waited for, which it does not depend on
        seen, key_at, value_at, key_scale_at, value_scale_at = places_of(
            start, position, held, at, wraps, slots, window, chunk, table, key_row, value_row, key_scale_row,
            value_scale_row, TILE, WINDOWED, CHUNKED, BLOCK, D, DV, KEY_SCALES, VALUE_SCALES,
        )  # fmt: skip
        first_keys, first_key_sizes = keys_of(
            keys, key_scales, seen, key_at, key_scale_at, dims, D, KEY_SCALES
        )  # fmt: skip
        first_values, first_value_sizes = values_of(
            values, value_scales, seen, value_at, value_scale_at, value_dims, DV, VALUE_SCALES
        )  # fmt: skip
        # where the new token lies
        if BLOCK == 0:
            own_keys, own_values = keys + at * D, values + at * DV
            own_key_scales, own_value_scales = key_scales + at * KEY_SCALES, value_scales + at * VALUE_SCALES
        else:
            block_of = tl.load(table + at // BLOCK).to(tl.int64)
            own_keys = keys + block_of * key_row + at % BLOCK * D
            own_values = values + block_of * value_row + at % BLOCK * DV
            own_key_scales = key_scales + block_of * key_scale_row + at % BLOCK * KEY_SCALES
            own_value_scales = value_scales + block_of * value_scale_row + at % BLOCK * VALUE_SCALES
        if EARLY:
            gdc_wait()
        # all of the token is under way at once: it is read as it is needed, once for every query head, for threads that
        # share it out anew wait for each other
        query_at = (row * KV_HEADS + head) * GROUP + heads
        q += row.to(tl.int64) * q_row
        new_key += row.to(tl.int64) * new_key_row + head * new_key_head
        new_value += row.to(tl.int64) * new_value_row + head * new_value_head
        query_head = ((head * GROUP + heads) * q_head)[:, None]
        place, value_place = dims[None, :] + heads[:, None] * 0, value_dims[None, :] + heads[:, None] * 0
        inside, value_inside = place < D, value_place < DV
        query_inside = inside & (heads[:, None] < GROUP)
        query = tl.load(q + query_head + place, mask=query_inside, other=0.0)
        key = tl.load(new_key + place, mask=inside, other=0.0)
        value = tl.load(new_value + value_place, mask=value_inside, other=0.0)
        if HALF != 0:
            turned = (place + HALF) % D
            other_half = tl.load(q + query_head + turned, mask=query_inside, other=0.0)
            other_key = tl.load(new_key + turned, mask=inside, other=0.0)
            straight = tl.load(cos + row * cos_row + place, mask=inside, other=0.0)
            across = tl.load(sin + row * sin_row + place, mask=inside, other=0.0)
            straight = straight.to(tl.float32)
            across = across.to(tl.float32)
            query = (query.to(tl.float32) * straight + other_half.to(tl.float32) * across).to(query.dtype)
            key = (key.to(tl.float32) * straight + other_key.to(tl.float32) * across).to(key.dtype)
        if PTX:
            query = in_place(query)
            value = in_place(value)
        if KEY_SCALES:
            key_block, key_sizes = place // 128, inside.to(tl.float32) * 0.0 + 1.0
            for number in tl.static_range(KEY_SCALES):
                largest = tl.max(tl.where(key_block == number, tl.abs(key.to(tl.float32)), 0.0), axis=1)
                key_sizes = tl.where(key_block == number, scale_of(largest)[:, None], key_sizes)
            key_codes = to_codes(key, key_sizes)
            key = numbers_of(key_codes, tl.float32, PTX) * key_sizes
        if VALUE_SCALES:
            value_block, value_sizes = value_place // 128, value_inside.to(tl.float32) * 0.0 + 1.0
            for number in tl.static_range(VALUE_SCALES):
                largest = tl.max(tl.where(value_block == number, tl.abs(value.to(tl.float32)), 0.0), axis=1)
                value_sizes = tl.where(value_block == number, scale_of(largest)[:, None], value_sizes)
            value_codes = to_codes(value, value_sizes)
            value = numbers_of(value_codes, tl.float32, PTX) * value_sizes
        if keeps:
            once, value_once = inside & (heads[:, None] == 0), value_inside & (heads[:, None] == 0)
            if KEY_SCALES:
                tl.store(own_keys + place, key_codes, mask=once)
                # all numbers of a block have its scale, and the first of them keeps it
                tl.store(own_key_scales + key_block, key_sizes, mask=once & (place % 128 == 0))
            else:
                tl.store(own_keys + place, key, mask=once)
            if VALUE_SCALES:
                tl.store(own_values + value_place, value_codes, mask=value_once)
                tl.store(own_value_scales + value_block, value_sizes, mask=value_once & (value_place % 128 == 0))
            else:
                tl.store(own_values + value_place, value, mask=value_once)
        # the first part has the new token, where it is this rank's, which nobody reads from the cache
        own = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1) * scale
        if CAPPED:
            own = capped(own, softcap)
        top = tl.where(keeps, own, float("-inf"))
        total = tl.where(keeps, 1.0, 0.0) + heads * 0.0
        result = tl.where(keeps, 1.0, 0.0) * value.to(tl.float32)
        top, total, result = attended(
            query, top, total, result, first_keys, first_key_sizes, first_values, first_value_sizes, seen,
            scale, softcap, CAPPED, EXACT, KEY_SCALES, VALUE_SCALES, FOLDED, PTX,
        )  # fmt: skip
        for tile in range(start + 1, tl.minimum(start + each, tiles)):
            seen, key_at, value_at, key_scale_at, value_scale_at = places_of(
                tile, position, held, at, wraps, slots, window, chunk, table, key_row, value_row, key_scale_row,
                value_scale_row, TILE, WINDOWED, CHUNKED, BLOCK, D, DV, KEY_SCALES, VALUE_SCALES,
            )  # fmt: skip
            tile_keys, tile_key_sizes = keys_of(keys, key_scales, seen, key_at, key_scale_at, dims, D, KEY_SCALES)
            tile_values, tile_value_sizes = values_of(
                values, value_scales, seen, value_at, value_scale_at, value_dims, DV, VALUE_SCALES
            )  # fmt: skip
            top, total, result = attended(
                query, top, total, result, tile_keys, tile_key_sizes, tile_values, tile_value_sizes, seen,
                scale, softcap, CAPPED, EXACT, KEY_SCALES, VALUE_SCALES, FOLDED, PTX,
            )  # fmt: skip
        ours = (heads[:, None] < GROUP) & (value_dims[None, :] < DV)
        if active == 1:
            if SINKS:
                sink = tl.load(sinks + head * GROUP + heads, mask=heads < GROUP, other=0.0).to(tl.float32)
                total += tl.exp2(sink * 1.4426950408889634 - top)
            if SHARED:
                found = result / tl.where(total == 0, 1.0, total)[:, None]
                tl.store(out + query_at[:, None] * (DV + 1) + value_dims[None, :], found, mask=ours)
                lse_at = query_at * (DV + 1) + DV
            else:
                tl.store(out + query_at[:, None] * DV + value_dims[None, :], result / total[:, None], mask=ours)
                lse_at = query_at
            if LSE:
                tl.store(lse + lse_at, (top + tl.log2(total)) * 0.6931471805599453, mask=heads < GROUP)
        else:
            part = (pair * splits + split) * GROUP + heads
            tl.store(parts + part[:, None] * DV + value_dims[None, :], result, mask=ours)
            tl.store(tops + part, top, mask=heads < GROUP)
            tl.store(sums + part, total, mask=heads < GROUP)
            tl.debug_barrier()
            came = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
            if came == active - 1:
                member = tl.arange(0, GROUP_MERGED)
                is_member = member < GROUP
                highest, whole, merged = parts_of(
                    parts, tops, sums, 0, splits, pair, active, member, value_dims, GROUP, MERGED, DV
                )  # fmt: skip
                for first_part in range(MERGED, active, MERGED):
                    other_top, other_whole, other = parts_of(
                        parts, tops, sums, first_part, splits, pair, active, member, value_dims, GROUP, MERGED, DV
                    )  # fmt: skip
                    higher = tl.maximum(highest, other_top)
                    base = tl.where(is_member, higher, 0.0)
                    shrinks, grows = tl.exp2(highest - base), tl.exp2(other_top - base)
                    whole = whole * shrinks + other_whole * grows
                    merged = merged * shrinks[:, None] + other * grows[:, None]
                    highest = higher
                if SINKS:
                    sink = tl.load(sinks + head * GROUP + member, mask=is_member, other=0.0).to(tl.float32)
                    whole += tl.exp2(sink * 1.4426950408889634 - highest)
                member_at = (row * KV_HEADS + head) * GROUP + member
                if SHARED:
                    out_at, lse_at = member_at * (DV + 1), member_at * (DV + 1) + DV
                else:
                    out_at, lse_at = member_at * DV, member_at
                tl.store(
                    out + out_at[:, None] + value_dims[None, :],
                    merged / tl.where(is_member, whole, 1.0)[:, None],
                    mask=is_member[:, None] & (value_dims[None, :] < DV),
                )
                if LSE:
                    tl.store(lse + lse_at, (highest + tl.log2(whole)) * 0.6931471805599453, mask=is_member)
                tl.store(counters + pair, 0)
