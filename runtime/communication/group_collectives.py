"""What a collective does over one process group: functions of a tensor, made once per node.

Uneven all_gather goes through all_to_all_single, which gloo and NCCL both take with uneven sizes; on gloo it was
quicker than padding for all but small pieces; at two ranks, broadcasts were a little quicker still.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch import distributed as dist

from runtime.ops.collectives import all_gather, all_reduce

__all__ = ["OPERATIONS", "alone"]

# renamed in torch 2.13
_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def alone(x: Tensor) -> Tensor:
    """Along an axis of size 1 every collective here is the identity."""
    return x


def _all_reduce(group: dist.ProcessGroup, size: int, *, overwrite: bool) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        if not (overwrite and x.is_contiguous()):
            x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    return run


def _all_gather(
    group: dist.ProcessGroup, size: int, *, overwrite: bool, dim: int, sizes: list[int] | None = None
) -> Callable[[Tensor], Tensor]:
    def even(x: Tensor) -> Tensor:
        flat = x.new_empty(size * x.numel())
        _gather_single(flat, x.reshape(-1), group=group)
        return torch.cat(flat.view(size, *x.shape).unbind(0), dim=dim)

    def uneven(x: Tensor) -> Tensor:
        assert sizes is not None
        at = dim % x.dim()
        rest = math.prod(x.shape[:at]) * math.prod(x.shape[at + 1 :])
        counts = [piece * rest for piece in sizes]
        flat = x.new_empty(sum(counts))
        dist.all_to_all_single(flat, x.reshape(-1).repeat(size), counts, [x.numel()] * size, group=group)
        shapes = [(*x.shape[:at], piece, *x.shape[at + 1 :]) for piece in sizes]
        return torch.cat(
            [part.view(shape) for part, shape in zip(torch.split(flat, counts), shapes, strict=True)], dim=at
        )

    return even if sizes is None or len(set(sizes)) == 1 else uneven


OPERATIONS: dict[Callable[..., Tensor], Callable[..., Callable[[Tensor], Tensor]]] = {
    all_reduce: _all_reduce,
    all_gather: _all_gather,
}
"""By op: (group, its size, overwrite=, and the op's own options) -> a function of the tensor."""
