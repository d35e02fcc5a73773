"""Attention of one new token per row to the latents in a cache, which all heads share; see `latent_decode`.

Each program of `attend` takes HEAD_BLOCK heads of one row, as the rows of a matrix, and one of `splits` parts of the
latents that the row has: a tile of them is read once, as keys and as values (arXiv:2405.04434, section 2.1, absorbed).
What lies behind the row's length is not read. `merge` puts the parts together by their log-sum-exp (flash decoding:
arXiv:2311.01282). Everything that depends on the length is read on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.ops.kernels.decode.float8_kernel import largest_of, numbers_of, scale_of, to_codes

__all__ = ["attend", "merge"]


@triton.jit
def attend(
    q, new_row, positions, rows, scales, sinks, out, lse, parts, tops, sums, table,
    scale, softcap, window, chunk, slots, least_tiles, splits, table_row, row_stride, scale_stride,
    HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, E: tl.constexpr,
    E_PADDED: tl.constexpr, TILE: tl.constexpr, WINDOWED: tl.constexpr, CHUNKED: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
    SCALES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """R numbers of a row of the cache are the latent, E are carried beside it. `scale`, BLOCK and PTX are as those
    of `key_value_kernel`; SCALES: how many a row has, which is codes of float8 then.
    """
    head_blocks = tl.cdiv(HEADS, HEAD_BLOCK)
    row = tl.program_id(0) // head_blocks
    head_block = tl.program_id(0) % head_blocks
    split = tl.program_id(1)
    position = tl.load(positions + row)
    # under way while the position is waited for
    heads = head_block * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    dims = tl.arange(0, R_PADDED)
    more = tl.arange(0, E_PADDED)
    query_at = (row * HEADS + heads) * (R + E)
    is_head = heads < HEADS
    query = tl.load(q + query_at[:, None] + dims[None, :], mask=is_head[:, None] & (dims[None, :] < R), other=0.0)
    if E:
        query_more = tl.load(
            q + query_at[:, None] + R + more[None, :], mask=is_head[:, None] & (more[None, :] < E), other=0.0
        )
        new_more = tl.load(new_row + row * (R + E) + R + more, mask=more < E, other=0.0)
    new = tl.load(new_row + row * (R + E) + dims, mask=dims < R, other=0.0)
    at = position % slots
    first_tile, tiles, each, active, wraps, held = _extent(
        position, slots, window, chunk, least_tiles, splits, WINDOWED, CHUNKED, TILE
    )
    if split < active:
        if BLOCK == 0:
            rows += row.to(tl.int64) * row_stride
            own_row = rows + at * (R + E)
            if SCALES:
                scales += row.to(tl.int64) * scale_stride
                own_scales = scales + at * SCALES
        else:
            table += row.to(tl.int64) * table_row
            block_of = tl.load(table + at // BLOCK).to(tl.int64)
            own_row = rows + block_of * row_stride + at % BLOCK * (R + E)
            if SCALES:
                own_scales = scales + block_of * scale_stride + at % BLOCK * SCALES
        writes = (split == 0) & (head_block == 0)
        if SCALES:
            of_new, sizes = dims // 128, dims * 0.0 + 1.0
            of_more, sizes_more = (R + more) // 128, more * 0.0 + 1.0
            for number in tl.static_range(SCALES):
                largest = largest_of(new, of_new, number)
                if E:
                    largest = tl.maximum(largest, largest_of(new_more, of_more, number))
                size = scale_of(largest)
                sizes = tl.where(of_new == number, size, sizes)
                sizes_more = tl.where(of_more == number, size, sizes_more)
                tl.store(own_scales + number, size, mask=writes)
            codes = to_codes(new, sizes)
            tl.store(own_row + dims, codes, mask=(dims < R) & writes)
            own_latent = numbers_of(codes, tl.float32, PTX) * sizes
            if E:
                codes_more = to_codes(new_more, sizes_more)
                tl.store(own_row + R + more, codes_more, mask=(more < E) & writes)
                own_more = numbers_of(codes_more, tl.float32, PTX) * sizes_more
        else:
            tl.store(own_row + dims, new, mask=(dims < R) & writes)
            own_latent = new.to(tl.float32)
            if E:
                tl.store(own_row + R + more, new_more, mask=(more < E) & writes)
                own_more = new_more.to(tl.float32)
        # the first part has the new token, which nobody reads from the cache
        own = tl.sum(query.to(tl.float32) * own_latent[None, :], axis=1)
        if E:
            own += tl.sum(query_more.to(tl.float32) * own_more[None, :], axis=1)
        own *= scale
        if CAPPED:
            own = _capped(own, softcap)
        top = tl.where(split == 0, own, float("-inf"))
        total = tl.where(split == 0, 1.0, 0.0) + heads * 0.0
        result = tl.where(split == 0, 1.0, 0.0) * own_latent[None, :] + heads[:, None] * 0.0
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
                row_at, scale_at = slot * (R + E), slot * SCALES
            else:
                blocks = tl.load(table + slot // BLOCK, mask=seen, other=0).to(tl.int64)
                row_at = blocks * row_stride + slot % BLOCK * (R + E)
                scale_at = blocks * scale_stride + slot % BLOCK * SCALES
            latent = tl.load(
                rows + row_at[:, None] + dims[None, :], mask=seen[:, None] & (dims[None, :] < R), other=0.0
            )
            if SCALES:
                latent = _scaled(
                    numbers_of(latent, query.dtype, PTX), scales, scale_at, seen, R, R_PADDED, TILE
                ).to(query.dtype)  # fmt: skip
            if EXACT:
                scores = tl.dot(query, tl.trans(latent), input_precision="ieee")
            else:
                scores = tl.dot(query, tl.trans(latent))
            if E:
                is_more = seen[None, :] & (more[:, None] < E)
                carried = tl.load(rows + row_at[None, :] + R + more[:, None], mask=is_more, other=0.0)
                if SCALES:
                    sizes_of = tl.load(
                        scales + scale_at[None, :] + ((R + more) // 128)[:, None], mask=is_more, other=0.0
                    )
                    carried = (numbers_of(carried, query.dtype, PTX).to(tl.float32) * sizes_of).to(query.dtype)
                if EXACT:
                    scores = tl.dot(query_more, carried, acc=scores, input_precision="ieee")
                else:
                    scores = tl.dot(query_more, carried, acc=scores)
            scores *= scale
            if CAPPED:
                scores = _capped(scores, softcap)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
            shrinks = tl.exp2(top - base)
            total = total * shrinks + tl.sum(weights, axis=1)
            result = result * shrinks[:, None]
            if EXACT:
                result = tl.dot(weights, latent, acc=result, input_precision="ieee")
            else:
                result = tl.dot(weights.to(latent.dtype), latent, acc=result)
            top = higher
        ours = is_head[:, None] & (dims[None, :] < R)
        place = row * HEADS + heads
        if active == 1:
            if SINKS:
                sink = tl.load(sinks + heads, mask=is_head, other=0.0).to(tl.float32)
                total += tl.exp2(sink * 1.4426950408889634 - top)
            tl.store(out + place[:, None] * R + dims[None, :], result / total[:, None], mask=ours)
            if LSE:
                tl.store(lse + place, (top + tl.log2(total)) * 0.6931471805599453, mask=is_head)
        else:
            part = place * splits + split
            tl.store(parts + part[:, None] * R + dims[None, :], result, mask=ours)
            tl.store(tops + part, top, mask=is_head)
            tl.store(sums + part, total, mask=is_head)


@triton.jit
def merge(
    positions, sinks, out, lse, parts, tops, sums, window, chunk, slots, least_tiles, splits,
    HEADS: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, SPLITS_PADDED: tl.constexpr, WINDOWED: tl.constexpr,
    CHUNKED: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr, MERGED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program takes WIDTH numbers of one head's result, MERGED parts at a time."""
    place = tl.program_id(0)
    dims = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    position = tl.load(positions + place // HEADS)
    _, _, _, active, _, _ = _extent(position, slots, window, chunk, least_tiles, splits, WINDOWED, CHUNKED, TILE)
    if active > 1:
        split = tl.arange(0, SPLITS_PADDED)
        there = split < active
        tops_of = tl.load(tops + place * splits + split, mask=there, other=float("-inf"))
        sums_of = tl.load(sums + place * splits + split, mask=there, other=0.0)
        highest = tl.max(tops_of, axis=0)
        whole = tl.sum(sums_of * tl.exp2(tops_of - highest), axis=0)
        merged = tl.zeros((WIDTH,), dtype=tl.float32)
        for first in range(0, active, MERGED):
            some = first + tl.arange(0, MERGED)
            is_one = some < active
            tops_some = tl.load(tops + place * splits + some, mask=is_one, other=float("-inf"))
            results = tl.load(
                parts + (place * splits + some)[:, None] * R + dims[None, :],
                mask=is_one[:, None] & (dims[None, :] < R),
                other=0.0,
            )
            merged += tl.sum(results * tl.exp2(tops_some - highest)[:, None], axis=0)
        if SINKS:
            sink = tl.load(sinks + place % HEADS).to(tl.float32)
            whole += tl.exp2(sink * 1.4426950408889634 - highest)
        tl.store(out + place * R + dims, merged / whole, mask=dims < R)
        if LSE:
            tl.store(lse + place, (highest + tl.log2(whole)) * 0.6931471805599453, mask=tl.program_id(1) == 0)


@triton.jit
def _extent(
    position, slots, window, chunk, least_tiles, splits,
    WINDOWED: tl.constexpr, CHUNKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The first tile that the row sees and the end of all, tiles of a part, how many parts have any, whether slots were
    written more than once, and how many hold something.
    """
    length = position + 1
    wraps = length > slots
    held = tl.minimum(length, slots)
    first = position * 0
    if WINDOWED:
        first = tl.maximum(first, length - window)
    if CHUNKED:
        first = tl.maximum(first, position // chunk * chunk)
    first_tile = tl.where(wraps, 0, first // TILE)
    tiles = tl.cdiv(held, TILE)
    each = tl.maximum(tl.cdiv(tiles - first_tile, splits), least_tiles)
    return first_tile, tiles, each, tl.cdiv(tiles - first_tile, each), wraps, held


@triton.jit
def _scaled(
    numbers, scales, scale_at, seen, R: tl.constexpr, R_PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Latents [TILE, R_PADDED] times their scales, of which each row has one for 128 of them."""
    width: tl.constexpr = 128 if R_PADDED > 128 else R_PADDED
    count: tl.constexpr = R_PADDED // width
    number = tl.arange(0, count)
    sizes = tl.load(
        scales + scale_at[:, None] + number[None, :], mask=seen[:, None] & (number[None, :] * 128 < R), other=0.0
    )
    blocks = tl.reshape(numbers.to(tl.float32), (TILE, count, width))
    return tl.reshape(blocks * sizes[:, :, None], (TILE, R_PADDED))


@triton.jit
def _capped(scores, softcap):
    """Softcap * tanh(scores / softcap), times log2(e)."""
    bent = 2.0 / (1.0 + tl.exp2(-2.8853900817779268 * scores / softcap)) - 1.0
    return bent * softcap * 1.4426950408889634
