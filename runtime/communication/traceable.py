"""The collectives as torch.compile sees them: nodes of its graph, where the eager ones would break it in pieces.

    functional   torch.distributed's own (`_c10d_functional`), over a process group by its name
    opaque       one operator of ours around whatever carries a collective: shared memory, the simulator's meetings

torch keeps its functional collectives in the graph's order. The opaque operator says that it writes to `order`, the
same tensor for all of them: so no pass of the compiler can take one for pure, drop it, merge two or exchange them,
which would leave ranks waiting for each other.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtime.communication.communicator import Communicator
from runtime.ops.collectives import all_gather, all_reduce

__all__ = ["Traceable", "functional", "opaque"]

_functional: Any = torch.ops._c10d_functional


class Traceable:
    """Stands before a communicator where a function is built for torch.compile: binds what the compiler can follow."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator

    def bind(
        self,
        op: Callable[..., Tensor],
        axis: str,
        *,
        node: str,
        options: dict[str, Any],
        overwrite: bool = False,
    ) -> Callable[[Tensor], Tensor]:
        # overwriting is the compiler's to decide
        return self._communicator.bind_traceable(op, axis, node=node, options=options)


def functional(
    op: Callable[..., Tensor], group_name: str, num_ranks: int, *, dim: int = 0, sizes: list[int] | None = None
) -> Callable[[Tensor], Tensor]:
    """`op` over the process group of that name."""

    def reduce(x: Tensor) -> Tensor:
        done: Tensor = _functional.wait_tensor(_functional.all_reduce(x.contiguous(), "sum", group_name))
        return done

    def even(x: Tensor) -> Tensor:
        flat = _functional.wait_tensor(
            _functional.all_gather_into_tensor(x.contiguous().view(-1), num_ranks, group_name)
        )
        return torch.cat(flat.view(num_ranks, *x.shape).unbind(0), dim=dim)

    def uneven(x: Tensor) -> Tensor:
        assert sizes is not None
        at = dim % x.dim()
        rest = math.prod(x.shape[:at]) * math.prod(x.shape[at + 1 :])
        counts = [piece * rest for piece in sizes]
        sent = x.contiguous().view(-1).repeat(num_ranks)
        flat = _functional.wait_tensor(_functional.all_to_all_single(sent, counts, [x.numel()] * num_ranks, group_name))
        pieces = zip(flat.split(counts), sizes, strict=True)
        return torch.cat([part.view(*x.shape[:at], piece, *x.shape[at + 1 :]) for part, piece in pieces], dim=at)

    if op is all_reduce:
        return reduce
    assert op is all_gather
    return even if sizes is None or len(set(sizes)) == 1 else uneven


class _Bound:
    """A collective as its communicator has bound it; kept by who calls it."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self.run = run


_handles = itertools.count()
_bound: weakref.WeakValueDictionary[int, _Bound] = weakref.WeakValueDictionary()
"""By number: an operator's arguments are tensors and numbers."""


def opaque(
    op: Callable[..., Tensor],
    run: Callable[[Tensor], Tensor],
    order: Tensor,
    num_ranks: int,
    *,
    dim: int = 0,
    sizes: list[int] | None = None,
) -> Callable[[Tensor], Tensor]:
    """`run`, which does what `op` is, as one operator. It must not return what it is given."""
    bound, handle = _Bound(run), next(_handles)
    _bound[handle] = bound
    gathers = op is all_gather

    def collective(x: Tensor) -> Tensor:
        at, size = 0, -1
        if gathers:
            at, size = dim % x.dim(), sum(sizes) if sizes else num_ranks * x.shape[dim]
        found: Tensor = _collective(x, order, handle, at, size)
        return found

    vars(collective)["bound"] = bound  # lives as long as what calls it
    return collective


@torch.library.custom_op("partitioner::collective", mutates_args=("order",))
def _collective(x: Tensor, order: Tensor, handle: int, dim: int, size: int) -> Tensor:
    """`size`: of dim `dim` of what comes back; -1 where it is that of `x`."""
    return _bound[handle].run(x).contiguous()


@_collective.register_fake
def _(x: Tensor, order: Tensor, handle: int, dim: int, size: int) -> Tensor:
    shape = list(x.shape) if size < 0 else [*x.shape[:dim], size, *x.shape[dim + 1 :]]
    return x.new_empty(shape)
