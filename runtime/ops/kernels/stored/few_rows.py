"""Products of a few rows with weights that are held as stored, and what stands around them: one kernel each.

    few_rows(x, stored, bias)                        x [R, K], a weight [N, K]: x weight^T + bias, [R, N]
    few_rows(x, stored, gate=.., act="silu")         act(x gate^T) * (x weight^T)
    few_rows(x, stored, added=.., norm=(w, eps))     total = x + added [R, K], and the product of its rms_norm times w
    sum_for_norm(h, stored, x, w, behind, gate)      total = x + h weight^T of one row, made ready for such a product

Of bfloat16 by tensor cores (`dot_rows.py`), where columns share their scales in runs that are long enough. Otherwise as
`runtime/ops/kernels/decode/few_rows.py`, whose sums are of numbers that are rounded to x's dtype as well: here they
are multiplied as they are stored, and sums are scaled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.ops.kernels.decode import few_rows as decode
from runtime.ops.kernels.stored import dot_rows
from runtime.ops.kernels.stored.codes import CODES, Stored
from runtime.ops.kernels.stored.scales import run_of

__all__ = ["Stored", "few_rows", "sum_for_norm", "takes"]

_RUNS = {"float8": 16, "float4": 32, "int4": 32}
"""Columns of a thread at a time: 16 bytes of codes, four words."""
_MOST_ROWS = {"float8": 3, "float4": 1, "int4": 1}
"""Beyond, what is computed takes longer than by tiles."""
_SUMS = 8
"""Rows of matrices that a program takes."""
_MOST_WARPS = 4
_MOST_IDLE = 1.15
"""Chunks that threads are given, over those that there are."""


def takes(x: Tensor, weight: Stored, gate: Stored | None, *others: Tensor) -> bool:
    """Whether the kernel takes these: x [.., K] of a few rows, and codes whose columns share their scales in runs."""
    if not weight.codes.numel() or (gate is not None and not _alike(weight, gate)):
        return False
    if decode.takes(x, *others, most_rows=dot_rows.MOST_ROWS) and dot_rows.takes(x, weight, gate):
        return True
    if not decode.takes(x, *others, most_rows=_MOST_ROWS[weight.code]) or x.shape[-1] % _RUNS[weight.code]:
        return False
    return all(run_of(each.columns) > 0 for each in (weight, gate) if each is not None)


def _alike(weight: Stored, gate: Stored) -> bool:
    def traits(stored: Stored) -> tuple[Any, ...]:
        return stored.code, stored.codes.shape, stored.scales.dtype, stored.zeros is None

    return traits(weight) == traits(gate)


def few_rows(
    x: Tensor,
    weight: Stored,
    bias: Tensor | None = None,
    *,
    gate: Stored | None = None,
    act: str = "",
    added: Tensor | None = None,
    norm: tuple[Tensor | None, float] | None = None,
    ready: dot_rows.Ready | None = None,
) -> Any:
    """See the module's docstring: the product, or with `added` (which goes with `norm`) the total and the product.

    ready: what `sum_for_norm` yielded beside x, for this weight and gate.
    """
    from runtime.ops.kernels.stored import few_rows_kernel  # Triton comes with torch for GPUs only

    if ready is not None or (x.is_cuda and dot_rows.takes(x, weight, gate)):
        early = decode.can_launch_early(x.device)
        return dot_rows.dot_rows(x, weight, bias, gate=gate, act=act, added=added, norm=norm, ready=ready, early=early)
    x = decode.in_rows(x)
    left = x if added is None else decode.in_rows(added)
    (rows, inner), num_out, run = x.shape, weight.codes.shape[0], _RUNS[weight.code]
    out = x.new_empty(rows, num_out)
    total = out if added is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    scale, eps = (None, 0.0) if norm is None else norm
    first, second = _given(weight), _given(weight if gate is None else gate)
    tile_n = _SUMS if gate is None else _SUMS // 2
    warps = _warps(inner // run)
    early = decode.can_launch_early(x.device)
    few_rows_kernel.few_rows[(-(-num_out // tile_n),)](
        x, left, x if scale is None else scale.contiguous(), out, total, x if bias is None else bias.contiguous(),
        *first, *second, eps, num_out, inner, x.stride(0), left.stride(0),
        first[0].stride(0), first[1].stride(0), second[0].stride(0), second[1].stride(0),
        ROWS=rows, ADDS=added is not None, NORMS=norm is not None, WEIGHTED=scale is not None, ACT=act,
        BIAS=bias is not None, CODE=CODES[weight.code], EXPONENTS=weight.scales.dtype == torch.uint8,
        ZEROS=weight.zeros is not None, PTX=x.is_cuda, RUN=run, TILE_N=tile_n, CHUNKS=32 * warps,
        EVEN=num_out % tile_n == 0 and inner % (32 * warps * run) == 0, EARLY=early,
        num_warps=warps, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out if added is None else (total, out)


def sum_for_norm(
    h: Tensor, of_h: Stored, x: Tensor, scale: Tensor | None, weight: Stored, gate: Stored | None
) -> tuple[Tensor, dot_rows.Ready] | None:
    """The total x + h of_h^T of one row, and what `few_rows` of it with a norm of `scale` needs; None: not taken."""
    others = [x, *(() if scale is None else (scale,))]
    if not decode.takes(h, *others) or not takes(x, weight, gate):
        return None
    if not of_h.codes.numel() or not dot_rows.takes_ready(h, of_h, weight, gate):
        return None
    early = decode.can_launch_early(h.device)
    return dot_rows.sum_for_norm(h, of_h, x, scale, weight.code, early=early)


def _given(stored: Stored) -> tuple[Tensor, ...]:
    scales = stored.scales.contiguous()
    zeros = scales if stored.zeros is None else stored.zeros.contiguous()
    return (
        stored.codes.contiguous().view(torch.int32),
        scales,
        zeros,
        stored.rows.contiguous(),
        stored.columns.contiguous(),
    )


def _warps(chunks: int) -> int:
    """So many that few of their threads have nothing to do at the end of a row."""
    warps = _MOST_WARPS
    while warps > 1 and -(-chunks // (32 * warps)) * 32 * warps > _MOST_IDLE * chunks:
        warps //= 2
    return warps
