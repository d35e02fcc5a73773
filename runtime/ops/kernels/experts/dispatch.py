"""What `runtime.ops.experts` and `runtime.ops.expert_exchange` compute on a GPU, by the kernels of `dispatch_kernel`.

Nothing waits for the device. Each is an operator for torch.compile; a plain call goes past that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from runtime.ops.kernels.triton_needs import launch, missing_for_triton

__all__ = ["combined", "dispatched", "ends_of", "localised", "sort_choices", "summed", "takes"]

_SUB, _MOST_PARTS, _ROWS = 128, 128, 16
_ALONE = 512
"""Choices up to which one program sorts them."""
_BLOCK = 1024


def takes(*tensors: Tensor) -> bool:
    """Whether there are kernels for these, which lie on one device."""
    return tensors[0].is_cuda and not missing_for_triton()


def dispatched(hidden: Tensor, index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [T, H], index [T, K]  ->  rows [T K, H], order [T K], counts [E]: as `expert_dispatch`, but that rows of
    no expert are not written, and stand in order as -1 - slot.
    """
    if torch.compiler.is_compiling():
        return _dispatched(hidden, index, num_experts)  # type: ignore[no-any-return]
    return _dispatch(hidden, index, num_experts)


def combined(rows: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    """As `expert_combine`, of an order that `dispatched` gave, or its beginning."""
    if torch.compiler.is_compiling():
        return _combined(rows, order, gates)  # type: ignore[no-any-return]
    return _combine(rows, order, gates)


def localised(
    index: Tensor, gates: Tensor, table: Tensor, owner: Tensor, copies: Tensor, rank: int, none: int, has_copies: bool
) -> tuple[Tensor, Tensor]:
    """As `localise_experts`; table [E + 1], owner [E + 1, most], copies [E + 1]: see the kernel."""
    if torch.compiler.is_compiling():
        return _localised(index, gates, table, owner, copies, rank, none, has_copies)  # type: ignore[no-any-return]
    return _localise(index, gates, table, owner, copies, rank, none, has_copies)


def _dispatch(hidden: Tensor, index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    from runtime.ops.kernels.experts import dispatch_kernel  # Triton comes with torch for GPUs only

    tokens, choices = index.shape
    width, num_slots = hidden.shape[1], index.numel()
    rows = hidden.new_empty(num_slots, width)
    if not num_slots:
        empty = torch.empty(0, dtype=torch.int64, device=index.device)
        return rows, empty, torch.zeros(num_experts, dtype=torch.int64, device=index.device)
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    order, position, counts = sorted_choices(index, num_experts)
    _positions[order] = position
    block = min(2 * _BLOCK, 1 << (width - 1).bit_length())
    launch(
        dispatch_kernel.spread,
        (tokens, -(-width // block), 1),
        (hidden, position, rows, width, hidden.stride(0)),
        CHOICES=choices,
        BLOCK=block,
    )
    return rows, order, counts


def sorted_choices(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index [T, K], not empty  ->  order int64 [T K], position int32 [T K] and counts int64 [E]; see the kernels."""
    order = torch.empty(index.numel(), dtype=torch.int64, device=index.device)
    position = torch.empty(index.numel(), dtype=torch.int32, device=index.device)
    counts = torch.empty(num_experts, dtype=torch.int64, device=index.device)
    _ends[counts] = ends = torch.empty(num_experts, dtype=torch.int32, device=index.device)
    sort_choices(index, num_experts, order, position, counts, ends)
    return order, position, counts


_positions: Any = WeakIdKeyDictionary()
"""By an order that was made here, where each slot stands in it."""
_ends: Any = WeakIdKeyDictionary()
"""By counts that were counted here, where the rows of each expert end."""


def ends_of(counts: Tensor) -> Tensor:
    """Where the rows of each expert end, int32 [E]."""
    if not torch.compiler.is_compiling() and (ends := _ends.get(counts)) is not None:
        return ends  # type: ignore[no-any-return]
    return torch.cumsum(counts, 0, dtype=torch.int32)


def sort_choices(
    index: Tensor, num_experts: int, order: Tensor, position: Tensor, counts: Tensor, ends: Tensor
) -> None:
    """The same into what is given: whole numbers of any size. ends [E]: sums of counts."""
    from runtime.ops.kernels.experts import dispatch_kernel

    index, num_slots = index.contiguous(), index.numel()
    bins = 1 << (num_experts + 1).bit_length()
    num_parts = 1 if num_slots <= _ALONE else min(_MOST_PARTS, -(-num_slots // _SUB))
    chunk = -(-num_slots // (num_parts * _SUB)) * _SUB
    num_parts = -(-num_slots // chunk)
    parts = index
    if num_parts > 1:
        parts = torch.empty(num_parts * bins, dtype=torch.int32, device=index.device)
        launch(
            dispatch_kernel.count,
            (num_parts, 1, 1),
            (index, parts, num_slots, num_experts, chunk),
            BINS=bins,
            SUB=_SUB,
        )
    launch(
        dispatch_kernel.place,
        (num_parts, 1, 1),
        (index, parts, order, position, counts, ends, num_slots, num_experts, chunk, num_parts),
        BINS=bins,
        SUB=_SUB,
        ROWS=_ROWS,
        ALONE=num_parts == 1,
    )


def _combine(rows: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    from runtime.ops.kernels.experts import dispatch_kernel

    (tokens, choices), width = gates.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    if not out.numel():
        return out
    if (position := _positions.get(order)) is not None:
        return summed(rows, position, gates.contiguous(), out, choices)
    if rows.shape[0] == gates.numel():
        position = torch.empty(gates.numel(), dtype=torch.int32, device=rows.device)
    else:  # those that were left out
        position = torch.full((gates.numel(),), -1, dtype=torch.int32, device=rows.device)
    if order.shape[0]:
        given = (order.contiguous(), position, order.shape[0])
        launch(dispatch_kernel.invert, (-(-order.shape[0] // _BLOCK), 1, 1), given, BLOCK=_BLOCK)
    return summed(rows, position, gates.contiguous(), out, choices)


def summed(rows: Tensor, position: Tensor, gates: Tensor | None, out: Tensor, choices: int) -> Tensor:
    """Out [T, H]: of each token the rows that stand at position [T, choices], times gates of that shape."""
    from runtime.ops.kernels.experts import dispatch_kernel

    tokens, width = out.shape
    block = min(_BLOCK, 1 << (width - 1).bit_length())
    launch(
        dispatch_kernel.combine,
        (tokens, -(-width // block), 1),
        (rows.contiguous(), position, position if gates is None else gates, out, width),
        CHOICES=choices,
        GATED=gates is not None,
        SUM=_sum_type(rows, rows if gates is None else gates),
        BLOCK=block,
    )
    return out


def _sum_type(*tensors: Tensor) -> object:
    import triton.language as tl

    return tl.float64 if any(x.dtype == torch.float64 for x in tensors) else tl.float32


def _localise(
    index: Tensor, gates: Tensor, table: Tensor, owner: Tensor, copies: Tensor, rank: int, none: int, has_copies: bool
) -> tuple[Tensor, Tensor]:
    from runtime.ops.kernels.experts import dispatch_kernel

    index, gates = index.contiguous(), gates.contiguous()
    local, kept = torch.empty_like(index), torch.empty_like(gates)
    if index.numel():
        numbers = (index.numel(), index.shape[1], table.shape[0] - 1, none, rank, owner.shape[1])
        launch(
            dispatch_kernel.localise,
            (-(-index.numel() // _BLOCK), 1, 1),
            (index, gates, table, owner, copies, local, kept, *numbers),
            COPIES=has_copies,
            BLOCK=_BLOCK,
        )
    return local, kept


_dispatched = torch.library.custom_op("partitioner::expert_dispatch", _dispatch, mutates_args=())
_combined = torch.library.custom_op("partitioner::expert_combine", _combine, mutates_args=())
_localised = torch.library.custom_op("partitioner::localise_experts", _localise, mutates_args=())


@_dispatched.register_fake
def _(hidden: Tensor, index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = index.numel()
    return (
        hidden.new_empty(slots, hidden.shape[1]),
        index.new_empty(slots, dtype=torch.int64),
        index.new_empty(num_experts, dtype=torch.int64),
    )


@_combined.register_fake
def _(rows: Tensor, order: Tensor, gates: Tensor) -> Tensor:
    return rows.new_empty(gates.shape[0], rows.shape[1])


@_localised.register_fake
def _(
    index: Tensor, gates: Tensor, table: Tensor, owner: Tensor, copies: Tensor, rank: int, none: int, has_copies: bool
) -> tuple[Tensor, Tensor]:
    return index.new_empty(index.shape), gates.new_empty(gates.shape)
