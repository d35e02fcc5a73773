"""Products of a few rows, as decode has them, with what stands before and behind them: one kernel each.

    few_rows(x, weight, bias)                        x [R, K], weight [N, K]: x weight^T + bias, [R, N]
    few_rows(x, weight, gate=.., act="silu")         act(x gate^T) * (x weight^T)
    few_rows(x, weight, added=.., norm=(w, eps))     total = x + added [R, K], and the product of its rms_norm times w

Sums are in float32 and round once, where the ops one by one round each time.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from runtime.ops.kernels.triton_needs import missing_for_triton

__all__ = ["KERNEL_DTYPES", "MOST_ROWS", "can_launch_early", "few_rows", "in_rows", "is_whole", "takes"]

MOST_ROWS = 1
"""Beyond, a row's multiplications take longer than the weights take to come: products of an 8B layer on an H200, which
torch's own do in 115 to 130 us, take 109 of one row, 155 of two and 381 of four."""
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COLUMNS, _PER_WARP = 1024, 256
"""Columns at a time, and of a warp."""
_SUMS = 8
"""Rows of matrices that a program takes, times the rows of x."""
_PROGRAMS_PER_PROCESSOR = 2
_WHOLE, _WHOLE_SUMS, _WHOLE_REGISTERS = 4096, 4, 128
"""Columns up to which all of a row with its norm is under way before the kernel waits, and rows of matrices that a
program takes then. Of half a layer of an 8B on an H200, gate and up take 27.9 us for 31.4, q, k and v 8.1 for 8.4; a
layer on two takes 66.4 for 70.0. Products without a norm win nothing by it (down: 20.9 us for 14.3).
"""


@functools.cache
def can_launch_early(device: torch.device) -> bool:
    """Whether a kernel may be launched before the end of the one before it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def takes(x: Tensor, *others: Tensor, most_rows: int | None = None) -> bool:
    """Whether the kernel takes these: x [.., K] of a few rows, and all of its dtype on one GPU."""
    most = MOST_ROWS if most_rows is None else most_rows
    if not x.is_cuda or x.dtype not in KERNEL_DTYPES or not 0 < x.shape[:-1].numel() <= most or not x.numel():
        return False
    alike = all(other.dtype == x.dtype and other.device == x.device and other.numel() for other in others)
    return alike and not missing_for_triton()


def is_whole(x: Tensor) -> bool:
    """Whether all of a product's weights are under way before its norm's input x [.., K] is there."""
    return x.shape[:-1].numel() == 1 and x.shape[-1] <= _WHOLE and x.element_size() == 2


def few_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    act: str = "",
    added: Tensor | None = None,
    norm: tuple[Tensor | None, float] | None = None,
) -> Any:
    """See the module's docstring: the product, or with `added` (which goes with `norm`) the total and the product."""
    from runtime.ops.kernels.decode import few_rows_kernel  # Triton comes with torch for GPUs only

    x = in_rows(x)
    left = x if added is None else in_rows(added)
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    other = weight if gate is None else gate if gate.stride(-1) == 1 else gate.contiguous()
    (rows, inner), num_out = x.shape, weight.shape[0]
    out = x.new_empty(rows, num_out)
    total = out if added is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    scale, eps = (None, 0.0) if norm is None else norm
    tile_k = min(_COLUMNS, max(16, 1 << (inner - 1).bit_length()))
    early = can_launch_early(x.device)
    if norm is not None and is_whole(x):
        tile_n = _tile_n(1 if gate is None else 2, num_out, x.device, _WHOLE_SUMS)
        few_rows_kernel.whole_row[(-(-num_out // tile_n),)](
            x, left, x if scale is None else scale.contiguous(), weight, other,
            x if bias is None else bias.contiguous(), out, total, eps, num_out, inner,
            weight.stride(0), other.stride(0), 0,
            ADDS=added is not None, WEIGHTED=scale is not None, ACT=act, BIAS=bias is not None, TILE_N=tile_n,
            TILE_K=tile_k, CHUNKS=-(-inner // tile_k), EVEN=inner % tile_k == 0, EARLY=early, PTX=x.is_cuda,
            num_warps=max(1, tile_k // _PER_WARP), maxnreg=_WHOLE_REGISTERS, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
        return out if added is None else (total, out)
    tile_n = _tile_n(rows * (1 if gate is None else 2), num_out, x.device, _SUMS)
    few_rows_kernel.few_rows[(-(-num_out // tile_n),)](
        x, left, x if scale is None else scale.contiguous(), weight, other, x if bias is None else bias.contiguous(),
        out, total, eps, num_out, inner, x.stride(0), left.stride(0), weight.stride(0), other.stride(0),
        ROWS=rows, ADDS=added is not None, NORMS=norm is not None, WEIGHTED=scale is not None, ACT=act,
        BIAS=bias is not None, TILE_N=tile_n, TILE_K=tile_k, EVEN=inner % tile_k == 0, EARLY=early,
        num_warps=max(1, tile_k // _PER_WARP), **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out if added is None else (total, out)


def _tile_n(sums: int, num_out: int, device: torch.device, most: int) -> int:
    """Rows of a matrix for each program: fewer where processors would have none."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    tile = max(1, most // (1 << (sums - 1).bit_length()))
    while tile > 1 and -(-num_out // tile) < _PROGRAMS_PER_PROCESSOR * processors:
        tile //= 2
    return tile


def in_rows(x: Tensor) -> Tensor:
    """[R, K], each row's numbers one after the other."""
    return x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else x.contiguous().view(-1, x.shape[-1])
