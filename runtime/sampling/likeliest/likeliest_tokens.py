"""The likeliest token of each row and what a step does with it, in a few kernels: op by op they are thirty.

    message = largest(own, tokens)      own [B, n], a rank's logits; tokens [n] -> [1, B, 2] float64: a logit, its token
    told = best(messages)               messages [P, B, 2] of all ranks -> [4, B], as `RowSampler.choose` has it
    advance(told, ids, positions, steps)        ids [B, 1] become the tokens; positions [B, 1] and steps [B] move on

Of equal logits the first column counts, and of those of several ranks the lowest token; where a logit is no number, the
row's is none.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from runtime.ops.kernels.decode.few_rows import KERNEL_DTYPES, can_launch_early
from runtime.ops.kernels.triton_needs import missing_for_triton, next_power_of_2

__all__ = ["advance", "best", "largest", "takes"]

_FEW_ROWS, _MOST_ROWS = 64, 256
_LEAST_PIECE, _MOST_PIECES = 1024, 128
"""Columns of a program, and programs of a row."""


def takes(own: Tensor) -> bool:
    """Whether the kernels take these logits."""
    fits = own.dtype in KERNEL_DTYPES and own.stride(-1) == 1 and 0 < len(own) <= _MOST_ROWS
    return own.is_cuda and fits and own.shape[1] < 1 << 31 and not missing_for_triton()


@functools.cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(_MOST_ROWS, dtype=torch.int32, device=device)


def largest(own: Tensor, tokens: Tensor) -> Tensor:
    from runtime.sampling.likeliest import likeliest_kernel  # Triton comes with torch for GPUs only

    rows, columns = own.shape
    piece = max(_LEAST_PIECE, next_power_of_2(-(-columns // _MOST_PIECES)))
    pieces = next_power_of_2(-(-columns // piece))
    found = torch.empty(rows, pieces, dtype=torch.int64, device=own.device)
    message = torch.empty(1, rows, 2, dtype=torch.float64, device=own.device)
    likeliest_kernel.largest[(rows, pieces)](
        own, tokens, found, _counters(own.device), message, columns, own.stride(0),
        PIECE=piece, PIECES=pieces, num_warps=4, **_early(own.device),
    )  # fmt: skip
    return message


def best(messages: Tensor) -> Tensor:
    from runtime.sampling.likeliest import likeliest_kernel  # Triton comes with torch for GPUs only

    messages = messages.contiguous()
    ranks, rows, _ = messages.shape
    told = torch.empty(4, rows, dtype=torch.float64, device=messages.device)
    likeliest_kernel.best[(1,)](
        messages, told, rows, RANKS=ranks, RANKS_PADDED=next_power_of_2(ranks), ROWS_PADDED=_padded(rows), num_warps=1,
        **_early(messages.device),
    )  # fmt: skip
    return told


def advance(told: Tensor, ids: Tensor, positions: Tensor, steps: Tensor) -> None:
    """All of int64 but `told`; not launched early, for what runs before reads the positions ahead of its turn."""
    rows = len(ids)
    if told.is_cuda and rows <= _MOST_ROWS and not missing_for_triton():
        from runtime.sampling.likeliest import likeliest_kernel  # Triton comes with torch for GPUs only

        likeliest_kernel.advance[(1,)](told, ids, positions, steps, rows, ROWS_PADDED=_padded(rows), num_warps=1)
        return
    ids.copy_(told[0, :, None])
    positions.add_(1)
    steps.add_(1)


def _early(device: torch.device) -> dict[str, Any]:
    early = can_launch_early(device)
    return {"EARLY": early, **({"launch_pdl": True} if early else {})}


def _padded(rows: int) -> int:
    """Few sizes, each of which is compiled."""
    return next(size for size in (1, _FEW_ROWS, _MOST_ROWS) if rows <= size)
