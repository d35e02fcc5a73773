"""Products of up to eight rows of bfloat16 with codes, by tensor cores: `dot_rows_kernel.py`.

dot_rows(x, weight, ..)            as `few_rows.few_rows` has it, for what `takes` says
sum_for_norm(h, weight, x, ..)     of one row: x + h weight^T, and what a product behind the norm of that needs: `Ready`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.ops.kernels.decode import few_rows as decode
from runtime.ops.kernels.stored.codes import CODES, Stored
from runtime.ops.kernels.stored.scales import are_in_order, largest_of, run_of

__all__ = ["MOST_ROWS", "Ready", "dot_experts", "dot_rows", "sum_for_norm", "takes", "takes_experts", "takes_ready"]

MOST_ROWS = 8
"""Columns of the narrowest tile of tensor cores."""
_TILE_N = 16
_TILE_K = {"float8": 64, "int4": 128}
"""Columns of a matrix that become one tile of tensor cores' operands, of 16 bytes of codes for each of four lanes."""
_SHAPES = {
    ("float8", "plain"): (8, 4),
    ("float8", "norm"): (4, 4),
    ("float8", "gate"): (2, 2),
    ("float8", "ready gate"): (2, 2),
    ("int4", "plain"): (8, 2),
    ("int4", "norm"): (4, 2),
    ("int4", "gate"): (2, 2),
    ("int4", "ready"): (4, 4),
    ("int4", "ready gate"): (4, 2),
}
"""Warps of a program, and tiles of a warp at a time."""
_MOST_REGISTERS = 128
_LEAST_OF_ONE_ROW = 8192
"""Columns of both matrices from which a single row is taken: in shorter ones the start of a program is too large a part
of its time (on an H200, 4096 columns: FP8 7.4 us for 6.8, 4 bits 5.8 for 5.5; 14,336: 17.7 for 24.9, 12.7 for 19.8).
Where a row is made ready for its norm's product, that does not hold for four bits (q, k and v 6.9 us for 8.0; gate and
up 21.3 for 26.0, FP8 32.0 for 36.8), and what makes it ready takes as long as any other (5.3 us for 5.5, FP8 6.9 for
7.0).
"""
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
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    if rows == 1 and columns * (1 if gate is None else 2) < _LEAST_OF_ONE_ROW:
        return False
    return x.dtype == torch.bfloat16 and 0 < rows <= MOST_ROWS and _fits(columns, weight, gate)


def takes_ready(h: Tensor, of_h: Stored, weight: Stored, gate: Stored | None) -> bool:
    """Whether `sum_for_norm` takes h [.., K] and its weight, and what it makes ready is worth it for those behind."""
    is_row = h.dtype == torch.bfloat16 and h.shape[:-1].numel() == 1
    if not is_row or (weight.code, "ready" if gate is None else "ready gate") not in _SHAPES:
        return False
    return _fits(h.shape[-1], of_h, None) and _fits(of_h.codes.shape[0], weight, gate)


def _fits(columns: int, weight: Stored, gate: Stored | None) -> bool:
    tile_k = _TILE_K.get(weight.code)
    if tile_k is None or columns % tile_k:
        return False
    return all(run_of(each.columns) % tile_k == 0 < run_of(each.columns) for each in (weight, gate) if each is not None)


@dataclass(frozen=True)
class Ready:
    """One row, made ready for products behind its norm: programs read it as they need it, and compute nothing of it.

    x: [K] bfloat16, times the norm's weight, in the order in which a lane's registers hold operands: of eight columns
    c = 4 a + 2 b + d, the 4 b + 2 a + d-th for float8, the 4 d + 2 b + a-th for int4.
    squares: [ceil(K / 16)] float32, the sums of squares of 16 columns each, before the weight.
    code: of the matrices that it is for.
    """

    x: Tensor
    squares: Tensor
    code: str


def dot_rows(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None = None,
    *,
    gate: Stored | None = None,
    act: str = "",
    added: Tensor | None = None,
    norm: tuple[Tensor | None, float] | None = None,
    ready: Ready | None = None,
    early: bool = False,
) -> Any:
    """The product, or with `added` the total and the product. ready: what `norm` needs of x, if it is there; early:
    weights may be read before the kernel before this one has ended.
    """
    assert ready is None or (norm is not None and added is None and ready.code == weight.code)
    x = _in_pairs(x)
    left = x if added is None else _in_pairs(added)
    out = torch.empty(x.shape[0], weight.codes.shape[0], dtype=torch.bfloat16, device=x.device)
    total = x if added is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    scale, eps = (None, 0.0) if norm is None else norm
    scale = scale if ready is None else None
    kind = "gate" if gate is not None else "plain" if norm is None else "norm"
    if ready is not None:
        kind = "ready" if gate is None else "ready gate"
    _launch(
        x if ready is None else _in_pairs(ready.x), left, x if scale is None else _in_pairs(scale)[0], out, total,
        x if bias is None else bias.contiguous(), x, x if ready is None else ready.squares, weight, gate, eps,
        kind=kind, early=early, ROWS=x.shape[0], ADDS=added is not None, NORMS=norm is not None,
        WEIGHTED=scale is not None, ACT=act, BIAS=bias is not None, READY=ready is not None, FOR_NORM=0,
    )  # fmt: skip
    return out if added is None else (total.view(torch.bfloat16), out)


def sum_for_norm(
    h: Tensor, weight: Stored, x: Tensor, scale: Tensor | None, code: str, *, early: bool = False
) -> tuple[Tensor, Ready]:
    """The total x + h weight^T of one row [1, N], and what products behind its norm, of `scale`, need of it."""
    h = _in_pairs(h)
    out = torch.empty(1, weight.codes.shape[0], dtype=torch.bfloat16, device=h.device)
    ready = Ready(
        torch.empty_like(out[0]),
        torch.empty(-(-out.shape[1] // _TILE_N), dtype=torch.float32, device=h.device),
        code,
    )
    norm = h if scale is None else scale.contiguous()
    _launch(
        h, h, norm, out, h, x.reshape(-1).contiguous(), ready.x, ready.squares, weight, None, 0.0, kind="plain",
        early=early, ROWS=1, ADDS=False, NORMS=False, WEIGHTED=scale is not None, ACT="", BIAS=True, READY=False,
        FOR_NORM=2 if code == "int4" else 1,
    )  # fmt: skip
    return out, ready


def _launch(
    x: Tensor, added: Tensor, norm: Tensor, out: Tensor, total: Tensor, bias: Tensor, ready: Tensor, squares: Tensor,
    weight: Stored, gate: Stored | None, eps: float, *, kind: str, early: bool, **constants: Any,
) -> None:  # fmt: skip
    from runtime.ops.kernels.stored import dot_rows_kernel  # Triton comes with torch for GPUs only

    other = weight if gate is None else gate
    warps, parts = _SHAPES[weight.code, kind]
    wide = _WIDE.get(weight.scales.dtype, 0) if parts % 2 == 0 and _are_wide(weight) and _are_wide(other) else 0
    first, second = _given(weight, wide > 0), _given(other, wide > 0)
    num_out, inner = weight.codes.shape[0], weight.columns.shape[0]
    programs, pairs = -(-num_out // _TILE_N), inner // 2
    summed = -(-inner // _TILE_N) if constants["READY"] else pairs
    dot_rows_kernel.dot_rows[(programs,)](
        x, added, norm, out, total, bias, ready, squares, *first, *second, eps, num_out, inner, x.stride(0),
        added.stride(0), first[0].stride(0), first[1].stride(0), second[0].stride(0), second[1].stride(0),
        CODE=CODES[weight.code], EXPONENTS=weight.scales.dtype == torch.uint8, ZEROS=weight.zeros is not None,
        PTX=x.is_cuda, WARPS=warps, PARTS=parts, SHARE=_power(-(-pairs // programs)), WIDE=wide,
        SQUARES=min(_MOST_SQUARES, _power(summed)), EVEN=inner % (_TILE_K[weight.code] * warps * parts) == 0,
        EARLY=early, num_warps=warps, maxnreg=_MOST_REGISTERS, **constants, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


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
