"""Routed experts as ops: sort the tokens by expert, one linear per expert, and the weighted sum per token.

    hidden [T, H]   index [T, K]   ->  rows [T*K, H], order [T*K], counts [E]
    rows [N, in]    weight [E, out, in] or, transposed, [E, in, out]    ->  [N, out]
    rows [T*K, H]   order [T*K]    gates [T, K]    ->  [T, H]
    index, gates [T, K]  ->  the same, limited: "no expert" and a gate of 0 where an expert is full

Row i of the sorted rows is slot `order[i]` of the flattened [T, K]; the first counts[0] rows go to expert 0, and so
on. An index of num_experts or more means "no expert": those rows sort last, belong to no count, and stay zero; trimmed,
they are left out of rows and order. On a GPU kernels of Triton do this (`runtime.ops.kernels.experts`): rows of no
expert are then not written, stand in order as -1 - slot, and are not read.
Limited, an expert takes ceil(capacity x T K / E) choices at most of the T tokens that a rank has there, in the order of
the tokens; what is over is left out of the sum, and the other gates stay (GShard, arXiv:2006.16668, algorithm 1; Switch
Transformers, arXiv:2101.03961, section 2.2). A token's result then depends on the tokens before it.
Sparsely gated experts: arXiv:1701.06538; sorting them into groups: MegaBlocks, arXiv:2211.15841, section 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from runtime.ops.kernels.experts import dispatch as kernels
from runtime.ops.kernels.native import few_rows

__all__ = [
    "expert_combine",
    "expert_dispatch",
    "grouped_linear",
    "kept_choices",
    "limit_experts",
    "multiplies_at_once",
]

_MOST_UNTRIMMED = 1 << 15
"""Rows up to which to compute nothing with those of no expert costs less than to wait for their number."""


def expert_dispatch(
    hidden: Tensor, index: Tensor, num_experts: int, *, trim: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """See the module's docstring. trim: without the rows of no expert, whose number the host then waits for; kernels
    leave out only many.
    """
    if kernels.takes(hidden, index):
        rows, order, counts = kernels.dispatched(hidden, index, num_experts)
        if trim and index.numel() > _MOST_UNTRIMMED and not _must_not_wait(hidden):
            num_rows = int(counts.sum())
            return rows[:num_rows], order[:num_rows], counts
        return rows, order, counts
    experts, order = torch.sort(index.reshape(-1), stable=True)
    bounds = torch.arange(num_experts + 1, device=index.device, dtype=experts.dtype)
    counts = torch.searchsorted(experts, bounds).diff()
    if trim:
        order = order[: int(counts.sum())]
    return hidden[order // index.shape[1]], order, counts


def grouped_linear(
    rows: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """See the module's docstring."""
    matrix = weight if transposed else weight.transpose(-2, -1)
    if _has_kernel(rows, matrix):
        ends = kernels.ends_of(counts)
        out = torch._grouped_mm(rows, matrix, offs=ends)
        if bias is None and kernels.takes(rows):
            return out  # nobody reads what the product leaves as it was
        row = torch.arange(rows.shape[0], device=rows.device)
        if bias is not None:
            expert = torch.searchsorted(ends, row, right=True).clamp(max=bias.shape[0] - 1)
            out = out + bias[expert]
        # the kernel leaves the rows of no expert uninitialised
        return torch.where((row < ends[-1])[:, None], out, 0)
    if _must_not_wait(rows):
        return _by_every_expert(rows, matrix, counts, bias)
    out = rows.new_empty(rows.shape[0], matrix.shape[-1])
    # products are written where they belong, but for those that a gradient goes back through
    in_place = not torch.is_grad_enabled()
    start = 0
    for i, count in enumerate(counts.tolist()):
        if not count:
            continue
        mine, into = rows[start : start + count], out[start : start + count]
        own_bias = None if bias is None else bias[i]
        if not transposed and few_rows.takes(mine, weight[i], own_bias):
            few_rows.multiplied(mine, weight[i], own_bias, out=into)
        elif not in_place:
            into.copy_(functional.linear(mine, matrix[i].transpose(0, 1), own_bias))
        elif own_bias is None:
            torch.mm(mine, matrix[i], out=into)
        else:
            torch.addmm(own_bias, mine, matrix[i], out=into)
        start += count
    out[start:].zero_()
    return out


def _by_every_expert(rows: Tensor, matrix: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """The same, by products of all rows with each expert: more of them, and the host need not know whose they are."""
    ends = counts.cumsum(0)
    row = torch.arange(rows.shape[0], device=rows.device)
    expert = torch.searchsorted(ends, row, right=True)
    out = rows.new_zeros(rows.shape[0], matrix.shape[-1])
    for i in range(matrix.shape[0]):
        made = functional.linear(rows, matrix[i].transpose(0, 1), None if bias is None else bias[i])
        out = torch.where((expert == i)[:, None], made, out)
    return out


def expert_combine(rows: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    """See the module's docstring."""
    if kernels.takes(rows, gates):
        return kernels.combined(rows, order, gates)
    if rows.shape[0] != gates.numel():  # trimmed
        weighted = rows * gates.reshape(-1)[order][:, None]
        out = weighted.new_zeros(gates.shape[0], rows.shape[1])
        return out.index_add_(0, order // gates.shape[1], weighted).to(rows.dtype)
    slots = torch.empty_like(rows)
    slots[order] = rows
    weighted = slots.view(*gates.shape, rows.shape[-1]) * gates[..., None]
    return weighted.sum(dim=1).to(rows.dtype)


def limit_experts(index: Tensor, gates: Tensor, *, num_experts: int, capacity: float) -> tuple[Tensor, Tensor]:
    """See the module's docstring. The host reads no number."""
    kept = kept_choices(index, num_experts=num_experts, capacity=capacity)
    return torch.where(kept, index, num_experts), torch.where(kept, gates, 0)


def kept_choices(index: Tensor, *, num_experts: int, capacity: float) -> Tensor:
    """Which choices [T, K] their experts have room for; "no expert" is always kept."""
    most = max(1, math.ceil(capacity * index.numel() / num_experts))
    experts, order = torch.sort(index.reshape(-1).clamp(max=num_experts), stable=True)
    starts = torch.searchsorted(experts, torch.arange(num_experts + 1, device=index.device, dtype=experts.dtype))
    place = torch.arange(len(order), device=index.device) - starts[experts]
    fits = (place < most) | (experts == num_experts)
    return torch.empty_like(fits).index_copy_(0, order, fits).view(index.shape)


def multiplies_at_once(device: torch.device) -> bool:
    """Whether torch's grouped matmul is a kernel there, which reads on the GPU how many rows each expert has: on Hopper
    and Blackwell. On other GPUs it is a loop of products, for which the host waits, as it does here.
    """
    is_there = device.type == "cuda" and hasattr(torch, "_grouped_mm")
    return is_there and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _must_not_wait(rows: Tensor) -> bool:
    """Whether the host must not ask the GPU for numbers: in captured steps, and in compiled ones, which are one graph
    that may be captured later.
    """
    return rows.is_cuda and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())


def _has_kernel(rows: Tensor, matrix: Tensor) -> bool:
    """Whether torch's grouped matmul takes these: bfloat16, rows of whole 16-byte units."""
    return (
        multiplies_at_once(rows.device)
        and rows.dtype == matrix.dtype == torch.bfloat16
        and rows.shape[-1] % 8 == 0
        and matrix.shape[-1] % 8 == 0
    )
