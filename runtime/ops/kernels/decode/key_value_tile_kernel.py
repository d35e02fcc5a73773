"""Tiles of keys and values, and parts of an attention, inside the kernel of `key_value_kernel.py`; Triton.

keys_of     [D, TILE]       as they lie in the cache, with their scales where they are codes of float8
values_of   [TILE, Dv]
attended    largest scores [H], sums of weights [H] and of weighted values [H, Dv], with one more tile
parts_of    the same of parts that other programs have come to
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.ops.kernels.decode.float8_kernel import numbers_of

__all__ = ["attended", "capped", "in_place", "keys_of", "parts_of", "places_of", "values_of"]


@triton.jit
def in_place(x):
    """The same: as what it is laid out for, threads lay it out anew behind this and not where it was read."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
    )


@triton.jit
def places_of(
    tile, position, held, at, wraps, slots, window, chunk, table, key_row, value_row, key_scale_row, value_scale_row,
    TILE: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, KEY_SCALES: tl.constexpr, VALUE_SCALES: tl.constexpr,
):  # fmt: skip
    """Which slots of a tile are seen [TILE], and where their keys, values and scales of these begin."""
    slot = tile * TILE + tl.arange(0, TILE)
    seen = (slot < held) & (slot != at)
    if WINDOWED or CHUNKED:
        where = tl.where(wraps, position - (position - slot + slots) % slots, slot)
        if WINDOWED:
            seen = seen & (where > position - window)
        if CHUNKED:
            seen = seen & (where // chunk == position // chunk)
    if BLOCK == 0:
        return seen, slot * D, slot * DV, slot * KEY_SCALES, slot * VALUE_SCALES
    else:
        blocks = tl.load(table + slot // BLOCK, mask=seen, other=0).to(tl.int64)
        return (
            seen,
            blocks * key_row + slot % BLOCK * D,
            blocks * value_row + slot % BLOCK * DV,
            blocks * key_scale_row + slot % BLOCK * KEY_SCALES,
            blocks * value_scale_row + slot % BLOCK * VALUE_SCALES,
        )


@triton.jit
def keys_of(keys, scales, seen, key_at, scale_at, dims, D: tl.constexpr, KEY_SCALES: tl.constexpr):
    """Keys of a tile [D, TILE] as they lie in the cache, and their scales; seen where there are none."""
    inside = seen[None, :] & (dims[:, None] < D)
    tile = tl.load(keys + key_at[None, :] + dims[:, None], mask=inside, other=0.0)
    if KEY_SCALES > 1:
        return tile, tl.load(scales + scale_at[None, :] + (dims // 128)[:, None], mask=inside, other=0.0)
    elif KEY_SCALES == 1:
        return tile, tl.load(scales + scale_at, mask=seen, other=0.0)
    else:
        return tile, seen


@triton.jit
def values_of(values, scales, seen, value_at, scale_at, dims, DV: tl.constexpr, VALUE_SCALES: tl.constexpr):
    """Values of a tile [TILE, DV] alike."""
    inside = seen[:, None] & (dims[None, :] < DV)
    tile = tl.load(values + value_at[:, None] + dims[None, :], mask=inside, other=0.0)
    if VALUE_SCALES > 1:
        return tile, tl.load(scales + scale_at[:, None] + (dims // 128)[None, :], mask=inside, other=0.0)
    elif VALUE_SCALES == 1:
        return tile, tl.load(scales + scale_at, mask=seen, other=0.0)
    else:
        return tile, seen


@triton.jit
def attended(
    query, top, total, result, keys, key_sizes, values, value_sizes, seen, scale, softcap, CAPPED: tl.constexpr,
    EXACT: tl.constexpr, KEY_SCALES: tl.constexpr, VALUE_SCALES: tl.constexpr, FOLDED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The largest score, the sum of weights and that of weighted values, with those of one more tile."""
    if KEY_SCALES:
        keys = numbers_of(keys, query.dtype, PTX)
    if KEY_SCALES > 1:
        keys = keys.to(tl.float32) * key_sizes
    if EXACT:
        scores = tl.dot(query, keys.to(query.dtype), input_precision="ieee") * scale
    else:
        scores = tl.dot(query, keys.to(query.dtype)) * scale
    if KEY_SCALES == 1:
        scores *= key_sizes[None, :]
    if CAPPED:
        scores = capped(scores, softcap)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrinks = tl.exp2(top - base)
    total = total * shrinks + tl.sum(weights, axis=1)
    if VALUE_SCALES:
        values = numbers_of(values, query.dtype, PTX)
    if VALUE_SCALES == 1 and FOLDED:
        weights *= value_sizes[None, :]
    elif VALUE_SCALES == 1:
        values = values.to(tl.float32) * value_sizes[:, None]
    elif VALUE_SCALES:
        values = values.to(tl.float32) * value_sizes
    if EXACT:
        added = tl.dot(weights, values.to(tl.float32), input_precision="ieee")
    else:
        added = tl.dot(weights.to(query.dtype), values.to(query.dtype))
    return higher, total, result * shrinks[:, None] + added


@triton.jit
def parts_of(
    parts, tops, sums, first, splits, pair, active, member, dims, GROUP: tl.constexpr, MERGED: tl.constexpr,
    DV: tl.constexpr,
):  # fmt: skip
    """What MERGED parts from `first` on have come to, as `attended` has it, put together within each thread."""
    tops_of, sums_of, results = (), (), ()
    for number in tl.static_range(MERGED):
        is_one = (member < GROUP) & (first + number < active)
        at = (pair * splits + first + number) * GROUP + member
        tops_of = tops_of + (tl.load(tops + at, mask=is_one, other=float("-inf"), cache_modifier=".cg"),)
        sums_of = sums_of + (tl.load(sums + at, mask=is_one, other=0.0, cache_modifier=".cg"),)
        inside = is_one[:, None] & (dims[None, :] < DV)
        results = results + (
            tl.load(parts + at[:, None] * DV + dims[None, :], mask=inside, other=0.0, cache_modifier=".cg"),
        )
    top = tops_of[0]
    for number in tl.static_range(1, MERGED):
        top = tl.maximum(top, tops_of[number])
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(tops_of[0] - base)
    total = sums_of[0] * weight
    result = results[0] * weight[:, None]
    for number in tl.static_range(1, MERGED):
        weight = tl.exp2(tops_of[number] - base)
        total += sums_of[number] * weight
        result += results[number] * weight[:, None]
    return top, total, result


@triton.jit
def capped(scores, softcap):
    """Softcap * tanh(scores / softcap), times log2(e)."""
    bent = 2.0 / (1.0 + tl.exp2(-2.8853900817779268 * scores / softcap)) - 1.0
    return bent * softcap * 1.4426950408889634
