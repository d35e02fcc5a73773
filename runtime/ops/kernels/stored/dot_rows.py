"""Products of up to eight rows of bfloat16 with codes, by tensor cores: `dot_rows_kernel.py`.

dot_rows(x, weight, ..)   as `few_rows.few_rows` has it, for what `takes` says
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.ops.kernels.decode import few_rows as decode
from runtime.ops.kernels.stored.codes import CODES, Stored
from runtime.ops.kernels.stored.scales import are_in_order, largest_of, run_of

__all__ = ["MOST_ROWS", "dot_experts", "dot_rows", "takes", "takes_experts"]

MOST_ROWS = 8
"""Columns of the narrowest tile of tensor cores."""
_TILE_N = 16
_TILE_K = {"float8": 64, "int4": 128}
"""Columns of a matrix that become one tile of tensor cores' operands, of 16 bytes of codes for each of four lanes."""
_SHAPES = {
    ("float8", "plain"): (8, 4),
    ("float8", "norm"): (4, 4),
    ("float8", "gate"): (2, 2),
    ("int4", "plain"): (8, 2),
    ("int4", "norm"): (4, 2),
    ("int4", "gate"): (2, 2),
}
"""Warps of a program, and tiles of a warp at a time."""
_MOST_REGISTERS = 128
_LEAST_OF_ONE_ROW = 8192
"""Columns of both matrices from which a single row is taken: in shorter ones the start of a program is too large a part
of its time (on an H200, 4096 columns: FP8 7.4 us for 6.8, 4 bits 5.8 for 5.5; 14,336: 17.7 for 24.9, 12.7 for 19.8)."""
_WIDE = {torch.float16: 1, torch.bfloat16: 2}
"""Scales of four bits' groups that are read two by two: 3 to 8% less time on an H200."""
_SHAPE_OF_EXPERTS = 2, 3
_MOST_OF_EXPERTS = 16
"""Rows of experts, each of which reads its matrix by itself."""
_LARGEST_EXPONENT = 128
_MOST_SQUARES = 4096
"""Pairs of numbers whose squares are summed at a time."""


def takes(x: Tensor, weight: Stored, gate: Stored | None = None) -> bool:
    """Whether the kernel takes these: x [.., K] of a few rows, and tiles of codes whose columns share a scale."""
    tile_k = _TILE_K.get(weight.code)
    rows, columns = x.shape[:-1].numel(), x.shape[-1] * (1 if gate is None else 2)
    if rows == 1 and columns < _LEAST_OF_ONE_ROW:
        return False
    if tile_k is None or x.dtype != torch.bfloat16 or not 0 < rows <= MOST_ROWS or x.shape[-1] % tile_k:
        return False
    return all(run_of(each.columns) % tile_k == 0 < run_of(each.columns) for each in (weight, gate) if each is not None)


def dot_rows(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None = None,
    *,
    gate: Stored | None = None,
    act: str = "",
    added: Tensor | None = None,
    norm: tuple[Tensor | None, float] | None = None,
    early: bool = False,
) -> Any:
    """The product, or with `added` the total and the product. early: weights may be read before the kernel before this
    one has ended.
    """
    from runtime.ops.kernels.stored import dot_rows_kernel  # Triton comes with torch for GPUs only

    x = _in_pairs(x)
    left = x if added is None else _in_pairs(added)
    (rows, pairs), num_out = x.shape, weight.codes.shape[0]
    out = torch.empty(rows, num_out, dtype=torch.bfloat16, device=x.device)
    total = x if added is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    scale, eps = (None, 0.0) if norm is None else norm
    other = weight if gate is None else gate
    wide = _WIDE.get(weight.scales.dtype, 0) if _are_wide(weight) and _are_wide(other) else 0
    first, second = _given(weight, wide > 0), _given(other, wide > 0)
    warps, parts = _SHAPES[weight.code, "gate" if gate is not None else "plain" if norm is None else "norm"]
    programs = -(-num_out // _TILE_N)
    dot_rows_kernel.dot_rows[(programs,)](
        x, left, x if scale is None else _in_pairs(scale)[0], out, total, x if bias is None else bias.contiguous(),
        *first, *second, eps, num_out, 2 * pairs, x.stride(0), left.stride(0),
        first[0].stride(0), first[1].stride(0), second[0].stride(0), second[1].stride(0),
        ROWS=rows, ADDS=added is not None, NORMS=norm is not None, WEIGHTED=scale is not None, ACT=act,
        BIAS=bias is not None, CODE=CODES[weight.code], EXPONENTS=weight.scales.dtype == torch.uint8,
        ZEROS=weight.zeros is not None, PTX=x.is_cuda, WARPS=warps, PARTS=parts, SHARE=_power(-(-pairs // programs)),
        WIDE=wide, SQUARES=min(_MOST_SQUARES, _power(pairs)),
        EVEN=2 * pairs % (_TILE_K[weight.code] * warps * parts) == 0,
        EARLY=early, num_warps=warps, maxnreg=_MOST_REGISTERS, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out if added is None else (total.view(torch.bfloat16), out)


def takes_experts(x: Tensor, weight: Stored) -> bool:
    """Whether `dot_experts` takes these: x [T, K] of a few rows, weights [E, N, K] of float4 with scales up to 2."""
    fits = weight.code == "float4" and x.dtype == torch.bfloat16 and weight.scales.dtype == torch.uint8
    if not fits or not 0 < x.shape[0] <= _MOST_OF_EXPERTS or x.shape[-1] % 32 or not weight.codes.numel():
        return False
    return run_of(weight.columns) > 0 and largest_of(weight.scales) <= _LARGEST_EXPONENT


def dot_experts(x: Tensor, weight: Stored, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Rows x [T, K], sorted by expert, times their experts' weights: [T, N]; rows of none are zero."""
    from runtime.ops.kernels.stored import dot_experts_kernel  # Triton comes with torch for GPUs only

    x = _in_pairs(x)
    codes, scales, _, rows, columns = _given(weight, wide=False)
    (num_x, pairs), (num_experts, num_out) = x.shape, weight.codes.shape[:2]
    out = torch.zeros(num_x, num_out, dtype=torch.bfloat16, device=x.device)
    warps, parts = _SHAPE_OF_EXPERTS
    dot_experts_kernel.dot_experts[(-(-num_out // _TILE_N), num_x)](
        x, codes, scales, rows, columns, scales if bias is None else bias.contiguous(), counts.contiguous(), out,
        num_out, 2 * pairs, num_experts, x.stride(0), codes.stride(-2), scales.stride(0),
        BIAS=bias is not None, EXPERTS=1 << (num_experts - 1).bit_length(), PTX=x.is_cuda, WARPS=warps, PARTS=parts,
        num_warps=warps,
    )  # fmt: skip
    return out


def _in_pairs(x: Tensor) -> Tensor:
    """[R, K] of bfloat16 as [R, K / 2] of int32."""
    rows = decode.in_rows(x)
    if rows.stride(0) % 2 or rows.storage_offset() % 2:
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(torch.int32)


def _given(stored: Stored, wide: bool) -> tuple[Tensor, ...]:
    codes, scales = stored.codes.contiguous().view(torch.int32), stored.scales.contiguous()
    zeros = scales if stored.zeros is None else stored.zeros.contiguous()
    if wide:
        scales = scales.view(torch.int32)
        zeros = scales if stored.zeros is None else zeros.view(torch.int16)
    return codes, scales, zeros, stored.rows.contiguous(), stored.columns.contiguous()


def _are_wide(stored: Stored) -> bool:
    """Whether scales of four bits' groups can be read two by two, in the columns' order."""
    groups = stored.scales.shape[-1]
    in_order = stored.code == "int4" and groups % 2 == 0 and stored.columns.shape[0] == _TILE_K["int4"] * groups
    in_order = in_order and stored.scales.storage_offset() % 2 == 0
    if stored.zeros is not None:
        in_order = in_order and stored.zeros.dtype == torch.uint8 and stored.zeros.storage_offset() % 2 == 0
    return in_order and stored.scales.dtype in _WIDE and are_in_order(stored.columns, _TILE_K["int4"])


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
