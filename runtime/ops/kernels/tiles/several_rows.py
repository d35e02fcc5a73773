"""Products of several rows in captured steps, with the gate behind them: one kernel each.

    several_rows(x, weight, bias)                    x [R, K], weight [N, K]: x weight^T + bias, [R, N]
    several_rows(x, weight, gate=.., act="silu")     act(x gate^T) * (x weight^T)

Sums are in float32 and round once. What a library's product loses is the time that the memory rests: until the kernel
before has ended, and while the last tiles are computed. Here neither is waited for. Layers of an 8B one after the other
on an H200 take 127 us at 32 rows where cuBLAS's take 136, and halves of their widths, as two GPUs have them, 74 for 83.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from runtime.ops.kernels.decode.few_rows import can_launch_early, in_rows
from runtime.ops.kernels.triton_needs import is_replayed, missing_for_triton

__all__ = ["MOST_ROWS", "several_rows", "takes"]

MOST_ROWS, _MOST_ROWS_OF_SMALL, _SMALL_BYTES = 64, 32, 64 << 20
"""Beyond, products take longer than the weights take to come. Beyond the second, what parts of the columns come to
takes as long to add up as what is saved, if a weight has fewer bytes and no gate.
"""
_DTYPES = (torch.bfloat16, torch.float16)
_TILE_M, _TILE_K = 64, 64
"""Rows of each matrix, and columns at a time. Without a gate, tiles of 128 need twice as many parts of the columns."""
_SHARED = 150 << 10
"""Bytes of shared memory for what is under way: the next product's programs start on processors that are through."""
_PROGRAMS_PER_PROCESSOR, _MOST_SPLITS = 1, 16
_MOST_STAGES, _LEAST_STEPS = 12, 4
"""Of a program."""
_MOST_TILES_PER_PROCESSOR = 2
"""Beyond, not all programs run at once."""
_AHEAD = 256
"""Columns that a program asks for before it waits."""
_BEHIND = 6
"""Steps before its end at which the next kernel's programs may start."""


def takes(x: Tensor, weight: Tensor, gate: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernel is for these in a captured step: x [.., K] of several rows, and all of its dtype, on a GPU."""
    if not x.is_cuda or x.dtype not in _DTYPES or not 1 < (rows := x.shape[:-1].numel()) <= MOST_ROWS:
        return False
    if gate is None and rows > _MOST_ROWS_OF_SMALL and weight.nbytes < _SMALL_BYTES:
        return False
    if not is_replayed() or not can_launch_early(x.device) or missing_for_triton():
        return False
    matrices = [weight] if gate is None else [weight, gate]
    others = matrices if bias is None else [*matrices, bias]
    alike = all(other.dtype == x.dtype and other.device == x.device for other in others)
    # as the hardware has it that loads tiles
    in_lines = all(w.stride(1) == 1 and w.stride(0) % 8 == 0 and w.data_ptr() % 16 == 0 for w in matrices)
    tiles = -(-weight.shape[0] // _TILE_M)
    return alike and in_lines and weight.numel() > 0 and tiles <= _MOST_TILES_PER_PROCESSOR * _processors(x.device)


def several_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gate: Tensor | None = None, act: str = ""
) -> Tensor:
    """See the module's docstring; x [R, K] with R up to `MOST_ROWS`."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # Triton comes with torch for GPUs only

    from runtime.ops.kernels.tiles import several_rows_kernel

    x, other = in_rows(x), weight if gate is None else gate
    (rows, inner), num_out = x.shape, weight.shape[0]
    tile_n = max(16, 1 << (rows - 1).bit_length())
    gated = 1 if gate is None else 2
    tiles, steps = -(-num_out // _TILE_M), -(-inner // _TILE_K)
    splits = _splits(tiles, steps, x.device)
    early = can_launch_early(x.device)
    ahead = min(_AHEAD, -(-steps // splits) * _TILE_K, inner) // 8 * 8
    out = x.new_empty(rows, num_out)
    parts = torch.empty(
        tiles * splits * gated * _TILE_M * tile_n if splits > 1 else 1, dtype=torch.float32, device=x.device
    )
    in_tiles = (TensorDescriptor(w, list(w.shape), list(w.stride()), [_TILE_M, _TILE_K]) for w in (weight, other))
    several_rows_kernel.several_rows[(tiles, splits)](
        x, weight, other, *in_tiles, x if bias is None else bias.contiguous(), out, parts, _counters(x.device), rows,
        num_out, inner, x.stride(0), weight.stride(0), other.stride(0),
        ACT=act, BIAS=bias is not None, TILE_M=_TILE_M, TILE_N=tile_n, TILE_K=_TILE_K, SPLITS=splits,
        STAGES=max(2, min(_MOST_STAGES, _SHARED // ((gated * _TILE_M + tile_n) * _TILE_K * x.element_size()))),
        AHEAD=ahead, BYTES=str(ahead * x.element_size()) if ahead else "", BEHIND=_BEHIND,
        EVEN=inner % _TILE_K == 0, EARLY=early, GATED=gated, num_warps=4,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def _splits(tiles: int, steps: int, device: torch.device) -> int:
    """Parts of the columns, so that every processor has a program."""
    return max(1, min(_PROGRAMS_PER_PROCESSOR * _processors(device) // tiles, _MOST_SPLITS, steps // _LEAST_STEPS))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(_MOST_TILES_PER_PROCESSOR * _processors(device), dtype=torch.int32, device=device)
