"""Which kernel computes a product with a stored weight, and how: see `runtime.ops.kernels.stored.stored_kernel`.

`product` is one operator for torch.compile. Nothing waits for the device but the first product of a weight, which looks
at how its columns share their scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.ops.kernels.stored import dot_rows
from runtime.ops.kernels.stored.codes import CODES, Stored
from runtime.ops.kernels.stored.scales import run_of

__all__ = ["product"]

_HALVES = (torch.bfloat16, torch.float16)
_FEW = 16
"""Rows of experts up to which each is a product by itself."""
_ROW_TILES = {"float8": (8, 4), "float4": (8, 2), "int4": (8, 2)}
"""TILE_N and the most warps of a product of one row."""
_MOST_IDLE = 1.1
"""Chunks that threads are given, over those that there are."""
_MOST_OF_NARROW = 16
_TILES, _WIDE_TILES = (32, 16, 128, 2, 6), (64, 64, 64, 4, 3)
"""TILE_N, TILE_M, TILE_K, warps and stages of products of few rows, and of many."""


@torch.library.custom_op("partitioner::stored_product", mutates_args=())
def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    code: str,
) -> Tensor:
    """The product of x [.., K], [.., N]; with `counts`, x [T, K] is sorted by expert, and rows of none are zero."""
    from runtime.ops.kernels.stored import stored_kernel  # Triton comes with torch for GPUs only

    stored = Stored(codes, scales, zeros, rows, columns, code)
    if counts is None and x.is_cuda and codes.numel() and dot_rows.takes(x, stored):
        return dot_rows.dot_rows(x, stored, bias).view(*x.shape[:-1], -1)  # type: ignore[no-any-return]
    if counts is not None and x.is_cuda and dot_rows.takes_experts(x, stored):
        return dot_rows.dot_experts(x, stored, bias, counts)
    left = x.reshape(-1, x.shape[-1]).contiguous()
    codes, scales = codes.contiguous(), scales.contiguous()
    num_x, num_out, inner = left.shape[0], rows.shape[-1], columns.shape[0]
    make = torch.empty if counts is None else torch.zeros
    out = make(num_x, num_out, dtype=x.dtype, device=x.device)
    if not num_x or not num_out:
        return out.reshape(*x.shape[:-1], num_out)
    experts = 1 if counts is None else counts.shape[0]
    run = run_of(columns) if x.dtype in _HALVES and (code == "float8" or inner % 2 == 0) else 0
    if run and code != "float8":
        left = left.view(torch.int32)
    given = (
        left, codes, scales, scales if zeros is None else zeros.contiguous(), rows.contiguous(), columns.contiguous(),
        left if bias is None else bias.contiguous(), rows if counts is None else counts.contiguous(), out,
    )  # fmt: skip
    strides = left.stride(0), codes.stride(-2), scales.stride(0)
    options: dict[str, Any] = {
        "CODE": CODES[code], "EXPONENTS": scales.dtype == torch.uint8, "ZEROS": zeros is not None,
        "BIAS": bias is not None, "EXPERTS": 0 if counts is None else 1 << (experts - 1).bit_length(),
        "BFLOAT": x.dtype == torch.bfloat16, "PTX": x.is_cuda,
    }  # fmt: skip
    chunk = 16 if code == "float8" else 32
    if run and inner % chunk == 0 and (num_x == 1 or (counts is not None and num_x <= _FEW)):
        tile_n, warps = _row_tile(code, inner // chunk)
        stored_kernel.one_row[(-(-num_out // tile_n), num_x)](
            *given, num_out, inner, experts, *strides,
            **options, RUN=chunk, TILE_N=tile_n, CHUNKS=32 * warps, num_warps=warps,
        )  # fmt: skip
        return out.reshape(*x.shape[:-1], num_out)
    tile_n, tile_m, tile_k, warps, stages = _TILES if num_x <= _MOST_OF_NARROW else _WIDE_TILES
    tile_k = min(tile_k, run) or 64
    num_tiles = -(-num_x // tile_m) + (0 if counts is None else experts)
    stored_kernel.tiles[(-(-num_out // tile_n), num_tiles)](
        *given, num_x, num_out, inner, experts, *strides,
        **options, EXACT=x.dtype == torch.float32, SHARED=run > 0, TILE_M=tile_m, TILE_N=tile_n, TILE_K=tile_k,
        num_warps=warps, num_stages=stages if run else 2,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], num_out)


@product.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    code: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows.shape[-1])


def _row_tile(code: str, chunks: int) -> tuple[int, int]:
    """TILE_N, and so many warps that few of their threads have nothing to do at the end of a row."""
    tile_n, warps = _ROW_TILES[code]
    while warps > 1 and -(-chunks // (32 * warps)) * 32 * warps > _MOST_IDLE * chunks:
        warps //= 2
    return tile_n, warps
