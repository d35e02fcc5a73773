"""Attention of one new token per row over cached latents, read once for all heads, by a kernel that adds the token too.

    q [B, H, 1, R + E]   the queries as they meet a row of the cache (absorbed), and then what meets what is carried
    row [B, 1, R + E]    of the new token           rows [>= B, 1, slots, R + E]     positions [B, 1]
    result [B, H, 1, R]  the mean of latents, and the log-sum-exp of the scores [B, H] where asked for

With a `table` [B, blocks of a row], rows are [1, blocks, block size, R + E]. With `scales` [.., n], rows are codes of
float8 (uint8), as `float8_rows` has them. Positions, lengths and captures are as those of `decode_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.ops.kernels.triton_needs import can_run, next_power_of_2

__all__ = ["can_decode_latent", "latent_decode"]

_TILES = {torch.float32: 16, torch.float16: 32, torch.bfloat16: 32}
"""Latents at a time, by the query's dtype."""
_LEAST_TILES, _MOST_SPLITS = 2, 128
_WARPS, _STAGES = {16: 4, 32: 8, 64: 8}, {16: 3, 32: 2, 64: 2}
_PER_PROCESSOR = {16: 1, 32: 1, 64: 1}
"""Programs for each processor: these three by the heads of a program."""
_WIDEST = 1024
_MOST_HEADS = 64
"""Of a program: so many rows of 512 numbers in float32 are what it can sum up."""
_MERGED, _MERGED_WIDTH = 16, 128
_LOG2_E = 1.4426950408889634


def can_decode_latent(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel takes a cache like this, for queries of `dtype`."""
    return rows.shape[-1] <= _WIDEST and min(rows.shape) > 0 and can_run(rows, dtype)


def latent_decode(
    q: Tensor,
    row: Tensor,
    positions: Tensor,
    rows: Tensor,
    sinks: Tensor | None = None,
    *,
    latent: int,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    table: Tensor | None = None,
    scales: Tensor | None = None,
) -> Any:
    """See the module's docstring; latent: R."""
    from runtime.ops.kernels.decode import latent_kernel  # Triton comes with torch for GPUs only

    batch, heads, _, width = q.shape
    device, carried = q.device, width - latent
    row_dim, block, slots = 0, 0, rows.shape[2]
    if table is not None:
        row_dim, block = 1, rows.shape[2]
        slots = table.shape[1] * block
    tile = _TILES[q.dtype]
    padded = next_power_of_2(latent)
    wide = padded > 512 or q.dtype == torch.float32
    head_block = min(16 if wide else _MOST_HEADS, max(16, next_power_of_2(heads)))
    head_blocks = -(-heads // head_block)
    splits = _splits(batch * head_blocks, slots // tile, device, each=_PER_PROCESSOR[head_block])
    out = q.new_empty(batch, heads, 1, latent)
    lse = torch.empty(batch, heads, dtype=torch.float32, device=device) if return_lse else out
    places = batch * heads * splits
    parts = torch.empty(places * (latent + 2) if splits > 1 else 1, dtype=torch.float32, device=device)
    tops, sums = parts[places * latent : places * (latent + 1)], parts[places * (latent + 1) :]
    capped = softcap is not None
    sinks = None if sinks is None else sinks.contiguous()
    positions = positions.contiguous()
    seen = window or 0, chunk or 1, slots, _LEAST_TILES, splits
    given: dict[str, Any] = {
        "HEADS": heads, "R": latent, "TILE": tile, "WINDOWED": window is not None,
        "CHUNKED": chunk is not None, "SINKS": sinks is not None, "LSE": return_lse,
    }  # fmt: skip
    latent_kernel.attend[(batch * head_blocks, splits)](
        q.contiguous(), row.contiguous(), positions, rows, lse if scales is None else scales,
        out if sinks is None else sinks, out, lse, parts, tops, sums, positions if table is None else table,
        scale if capped else scale * _LOG2_E, softcap or 1.0, *seen,
        0 if table is None else table.stride(0), rows.stride(row_dim), 0 if scales is None else scales.stride(row_dim),
        **given, HEAD_BLOCK=head_block, R_PADDED=max(16, padded), E=carried, E_PADDED=max(16, next_power_of_2(carried)),
        CAPPED=capped, EXACT=q.dtype == torch.float32, BLOCK=block, SCALES=0 if scales is None else scales.shape[-1],
        PTX=q.is_cuda, num_warps=_WARPS[head_block], num_stages=2 if wide else _STAGES[head_block],
    )  # fmt: skip
    if splits > 1:
        width = min(_MERGED_WIDTH, max(16, padded))
        latent_kernel.merge[(batch * heads, -(-latent // width))](
            positions, out if sinks is None else sinks, out, lse, parts, tops, sums, *seen,
            **given, SPLITS_PADDED=next_power_of_2(splits), MERGED=_MERGED, WIDTH=width,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _splits(programs: int, tiles: int, device: torch.device, *, each: int) -> int:
    """So many parts that processors have `each` about, however long rows are."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, min(each * processors // programs, _MOST_SPLITS, tiles // _LEAST_TILES))
