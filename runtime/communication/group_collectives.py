"""What each primitive does over one process group: functions of its operands, made once per node.

Uneven all_gather goes through all_to_all_single, which gloo and NCCL both take with uneven sizes; on gloo it was
quicker than padding for all but small pieces; at two ranks, broadcasts were a little quicker still.

reduce_scatter over gloo is an all_to_all of the pieces, summed here in order of coordinate: uneven pieces and every
dtype work, and each rank sends no more than in a ring. NCCL's own takes equal pieces only: shorter ones are padded.
Sends and receives are batched, also single ones: NCCL would connect an unbatched pair at its first use, unwatched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from runtime.communication.channels import Handle
from runtime.communication.meeting.exchange import HostGather
from runtime.ops.communicating import Kind

__all__ = ["PRIMITIVES", "Group", "begin_all_reduce", "begin_all_to_all", "sum_in_order", "to_pieces"]

# renamed in torch 2.13
_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
_scatter_single = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Group:
    """A process group, and the place of this rank in it."""

    handle: dist.ProcessGroup
    ranks: tuple[int, ...]
    coordinate: int
    is_nccl: bool
    on_host: HostGather | None = None
    """What ranks with GPUs compare by, where rank 0 is among them; others do so over the group or shared memory."""

    @property
    def size(self) -> int:
        return len(self.ranks)


def _all_reduce(group: Group, *, overwrite: bool) -> Callable[[Tensor], Tensor]:
    handle = group.handle

    def run(x: Tensor) -> Tensor:
        if not (overwrite and x.is_contiguous()):
            x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=handle)
        return x

    return run


def begin_all_reduce(group: Group, *, overwrite: bool) -> Callable[[Tensor], Handle]:
    """The same, which is waited for at the end: on the host over gloo, by the stream over NCCL."""
    handle = group.handle

    def begin(x: Tensor) -> Handle:
        total = x if overwrite and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(total, group=handle, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return total

        return Handle(finish)

    return begin


def _all_gather(
    group: Group, *, overwrite: bool = False, dim: int, sizes: list[int] | None = None
) -> Callable[[Tensor], Tensor]:
    handle, size = group.handle, group.size

    def even(x: Tensor) -> Tensor:
        flat = x.new_empty(size * x.numel())
        _gather_single(flat, x.reshape(-1), group=handle)
        return torch.cat(flat.view(size, *x.shape).unbind(0), dim=dim)

    def uneven(x: Tensor) -> Tensor:
        assert sizes is not None
        at = dim % x.dim()
        rest = math.prod(x.shape[:at]) * math.prod(x.shape[at + 1 :])
        counts = [piece * rest for piece in sizes]
        flat = x.new_empty(sum(counts))
        dist.all_to_all_single(flat, x.reshape(-1).repeat(size), counts, [x.numel()] * size, group=handle)
        shapes = [(*x.shape[:at], piece, *x.shape[at + 1 :]) for piece in sizes]
        return torch.cat(
            [part.view(shape) for part, shape in zip(torch.split(flat, counts), shapes, strict=True)], dim=at
        )

    return even if sizes is None or len(set(sizes)) == 1 else uneven


def _reduce_scatter(
    group: Group, *, overwrite: bool = False, dim: int, sizes: list[int] | None = None
) -> Callable[[Tensor], Tensor]:
    handle, size, own = group.handle, group.size, group.coordinate

    def summed_here(x: Tensor) -> Tensor:
        pieces = to_pieces(x, dim, sizes, size)
        counts = [piece.numel() for piece in pieces]
        mine = pieces[own]
        flat = x.new_empty(size * mine.numel())
        sent = torch.cat([piece.reshape(-1) for piece in pieces])
        dist.all_to_all_single(flat, sent, [mine.numel()] * size, counts, group=handle)
        return sum_in_order(flat.view(size, *mine.shape).unbind(0))

    def padded(x: Tensor) -> Tensor:
        pieces = to_pieces(x, dim, sizes, size)
        longest = max(piece.shape[dim] for piece in pieces)
        sent = torch.stack([_padded(piece, dim, longest) for piece in pieces])
        out = x.new_empty(sent[0].numel())
        _scatter_single(out, sent.view(-1), group=handle)
        return out.view(sent.shape[1:]).narrow(dim, 0, pieces[own].shape[dim])

    return padded if group.is_nccl else summed_here


def _all_to_all(group: Group, *, overwrite: bool = False) -> Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]:
    handle = group.handle

    def run(x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(receive_counts), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), list(receive_counts), list(send_counts), group=handle)
        return out

    return run


def begin_all_to_all(group: Group) -> Callable[[Tensor, Sequence[int], Sequence[int]], Handle]:
    """The same, which is waited for at the end: on the host over gloo, by the stream over NCCL."""
    handle = group.handle

    def begin(x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Handle:
        sent = x.contiguous()
        out = sent.new_empty((sum(receive_counts), *sent.shape[1:]))
        work = dist.all_to_all_single(out, sent, list(receive_counts), list(send_counts), group=handle, async_op=True)

        def finish() -> Tensor:
            nonlocal sent
            work.wait()
            sent = out  # what was sent is no longer read
            return out

        return Handle(finish)

    return begin


def _permute(group: Group, *, overwrite: bool = False, shift: int) -> Callable[[Tensor], Handle]:
    size, own = group.size, group.coordinate
    if shift % size == 0:
        return Handle.done
    to, from_ = group.ranks[(own + shift) % size], group.ranks[(own - shift) % size]

    def begin(x: Tensor) -> Handle:
        x = x.contiguous()
        out = torch.empty_like(x)
        return _begin(
            [dist.P2POp(dist.isend, x, to, group.handle), dist.P2POp(dist.irecv, out, from_, group.handle)], out
        )

    return begin


def _send(group: Group, *, overwrite: bool = False, to: int) -> Callable[[Tensor], Handle]:
    peer = group.ranks[to]

    def begin(x: Tensor) -> Handle:
        return _begin([dist.P2POp(dist.isend, x.contiguous(), peer, group.handle)], x)

    return begin


def _receive(
    group: Group, *, overwrite: bool = False, from_: int, device: torch.device
) -> Callable[[Sequence[int], torch.dtype], Handle]:
    peer = group.ranks[from_]

    def begin(shape: Sequence[int], dtype: torch.dtype) -> Handle:
        out = torch.empty(tuple(shape), dtype=dtype, device=device)
        return _begin([dist.P2POp(dist.irecv, out, peer, group.handle)], out)

    return begin


def _begin(operations: list[dist.P2POp], result: Tensor) -> Handle:
    works = dist.batch_isend_irecv(operations)

    def finish() -> Tensor:
        for work in works:
            work.wait()
        operations.clear()  # which have kept alive what was sent
        return result

    return Handle(finish)


def to_pieces(x: Tensor, dim: int, sizes: Sequence[int] | None, num_ranks: int) -> Sequence[Tensor]:
    """What each rank gets of `x` in a reduce_scatter; sizes None: equal pieces."""
    return torch.split(x, [x.shape[dim] // num_ranks] * num_ranks if sizes is None else list(sizes), dim)


def sum_in_order(pieces: Sequence[Tensor]) -> Tensor:
    """By coordinate, so that the sum is repeatable bit by bit."""
    total = pieces[0].clone()
    for piece in pieces[1:]:
        total += piece
    return total


def _padded(piece: Tensor, dim: int, size: int) -> Tensor:
    missing = size - piece.shape[dim]
    if not missing:
        return piece
    at = dim % piece.dim()
    filling = piece.new_zeros((*piece.shape[:at], missing, *piece.shape[at + 1 :]))
    return torch.cat([piece, filling], dim=at)


PRIMITIVES: dict[Kind, Callable[..., Callable[..., Any]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "permute": _permute,
    "send": _send,
    "receive": _receive,
}
"""By kind: (group, overwrite=, and the primitive's own options) -> a function of its operands."""
