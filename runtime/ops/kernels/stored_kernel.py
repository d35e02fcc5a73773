"""The kernel of `runtime.ops.kernels.stored`: a product with a matrix that is dequantised tile by tile.

    x [M, K]   codes [N, K] or [N, K/2]   scales, zeros [R, G]   rows [N]   columns [K]   ->   [M, N]

A program computes a tile of [TILE_M, TILE_N], and goes over K: it reads codes and their scales, rounds the weights to
the dtype of x, and adds a product of tiles in float32. For one token it is bound by the memory that it reads, which is
that of the codes: a half or a quarter of what bfloat16 takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["multiply"]

_CODES = {"float8": 0, "float4": 1, "int4": 2}


@triton.jit
def _float4(code):
    """Sign, two bits of exponent, one of mantissa: 0, 0.5, then 1 and 1.5 times 1, 2 and 4."""
    exponent = (code >> 1) & 3
    mantissa = (code & 1).to(tl.float32)
    power = tl.where(exponent == 3, 4.0, tl.where(exponent == 2, 2.0, 1.0))
    size = tl.where(exponent == 0, mantissa * 0.5, (1.0 + mantissa * 0.5) * power)
    return tl.where(code >= 8, -size, size)


@triton.jit
def _linear(
    x, codes, scales, zeros, rows, columns, bias, out, M, N, K, G, stride_x, stride_codes, stride_scales,
    CODE: tl.constexpr, EXPONENTS: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    at_m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    at_n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    row = tl.load(rows + at_n, mask=at_n < N, other=0).to(tl.int64)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for start in range(0, K, TILE_K):
        at_k = start + tl.arange(0, TILE_K)
        inside = (at_k[:, None] < K) & (at_n[None, :] < N)
        left = tl.load(
            x + at_m[:, None].to(tl.int64) * stride_x + at_k[None, :],
            mask=(at_m[:, None] < M) & (at_k[None, :] < K),
            other=0.0,
        )
        group = tl.load(columns + at_k, mask=at_k < K, other=0)
        place = row[None, :] * stride_scales + group[:, None]
        scale = tl.load(scales + place, mask=inside, other=0)
        if EXPONENTS:
            scale = tl.exp2(scale.to(tl.float32) - 127.0)
        else:
            scale = scale.to(tl.float32)
        line = codes + at_n[None, :].to(tl.int64) * stride_codes
        if CODE == 0:
            number = tl.load(line + at_k[:, None], mask=inside, other=0.0).to(tl.float32)
        else:
            byte = tl.load(line + at_k[:, None] // 2, mask=inside, other=0).to(tl.int32)
            code = (byte >> ((at_k[:, None] % 2) * 4)) & 15
            if CODE == 1:
                number = _float4(code)
            else:
                number = code.to(tl.float32)
                if ZEROS:
                    number -= tl.load(zeros + place, mask=inside, other=0).to(tl.float32)
                else:
                    number -= 8.0
        right = (number * scale).to(left.dtype)
        right = tl.where(inside, right, 0.0)
        total = tl.dot(left, right, acc=total, input_precision="ieee" if EXACT else "tf32")
    if BIAS:
        total += tl.load(bias + at_n, mask=at_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out + at_m[:, None].to(tl.int64) * N + at_n[None, :],
        total.to(out.dtype.element_ty),
        mask=(at_m[:, None] < M) & (at_n[None, :] < N),
    )


def multiply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    *,
    code: str,
) -> Tensor:
    """See the module's docstring; x may have any number of dims before K."""
    left = x.reshape(-1, x.shape[-1]).contiguous()
    codes, scales = codes.contiguous(), scales.contiguous()
    num_x, num_out, inner = left.shape[0], rows.shape[0], columns.shape[0]
    out = torch.empty(num_x, num_out, dtype=x.dtype, device=x.device)
    if num_x and num_out:
        tile_m, tile_n, tile_k = 16 if num_x <= 16 else 64, 64, 64
        grid = (triton.cdiv(num_x, tile_m), triton.cdiv(num_out, tile_n))
        _linear[grid](
            left, codes, scales, scales if zeros is None else zeros.contiguous(), rows.contiguous(),
            columns.contiguous(), left if bias is None else bias.contiguous(), out,
            num_x, num_out, inner, scales.shape[1], left.stride(0), codes.stride(0), scales.stride(0),
            CODE=_CODES[code], EXPONENTS=scales.dtype == torch.uint8, ZEROS=zeros is not None, BIAS=bias is not None,
            EXACT=x.dtype == torch.float32, TILE_M=tile_m, TILE_N=tile_n, TILE_K=tile_k, num_warps=4,
        )  # fmt: skip
    return out.reshape(*x.shape[:-1], num_out)
