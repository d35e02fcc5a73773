"""The primitives as torch.compile sees them: nodes of its graph, where the eager ones would break it in pieces.

    FunctionalChannel   torch.distributed's own (`_c10d_functional`), over a process group by its name
    OpaqueChannel       one operator of ours around whatever carries a primitive: shared memory, the simulator's
                        threads, sends and receives

torch keeps its functional collectives in the graph's order. The opaque operator says that it writes to `order`, the
same tensor for all of them: so no pass of the compiler can take one for pure, drop it, merge two or exchange them,
which would leave ranks waiting for each other. What is begun in an opaque operator is finished in it too.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.communication.channels import Channel, Handle, piece_sizes, require_counts
from runtime.communication.communicator import Binder, Communicator
from runtime.communication.group_collectives import Group, sum_in_order, to_pieces
from runtime.ops.communicating import Axes, Kind

__all__ = ["FunctionalChannel", "OpaqueChannel", "Traceable"]

_functional: Any = torch.ops._c10d_functional


class Traceable(Binder):
    """Stands before a communicator where a function is built for torch.compile: binds what the compiler can follow.

    Whether to overwrite an operand is the compiler's to decide.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator

    def channel(self, axes: Axes, *, node: str) -> Channel:
        return self._communicator.traceable_channel(axes, node=node)


class _TracedChannel(Channel):
    """What is prepared is not kept: a graph is traced once, and tracing must leave nothing behind."""

    def _ready(self, kind: Kind, **options: Any) -> Callable[..., Any]:
        return self.prepare(kind, **{name: value for name, value in options.items() if value is not None})


# -- by the name of a process group ------------------------------------------------------------------------------------


class FunctionalChannel(_TracedChannel):
    """Over `group`; what torch has no functional form of goes through `opaque`."""

    def __init__(self, group: Group, opaque: OpaqueChannel) -> None:
        super().__init__(opaque.axes, opaque.ranks, opaque.rank, node=opaque.node)
        self._group, self._opaque = group, opaque
        self._name = group.handle.group_name

    def prepare(self, kind: Kind, *, overwrite: bool = False, **options: Any) -> Callable[..., Any]:
        if kind == "all_reduce":
            return self._all_reduce()
        if kind == "all_gather":
            sizes = options.get("sizes")
            return self._even(options["dim"]) if sizes is None or len(set(sizes)) == 1 else self._uneven(**options)
        if kind == "reduce_scatter":
            return self._reduce_scatter(**options)
        if kind == "all_to_all":
            return self._all_to_all
        if kind == "permute":
            return self._permute(**options)
        return self._opaque.prepare(kind, **options)

    def _all_reduce(self) -> Callable[[Tensor], Tensor]:
        name = self._name
        return lambda x: _done(_functional.all_reduce(x.contiguous(), "sum", name))

    def _even(self, dim: int) -> Callable[[Tensor], Tensor]:
        num_ranks, name = len(self.ranks), self._name

        def run(x: Tensor) -> Tensor:
            flat = _done(_functional.all_gather_into_tensor(x.contiguous().view(-1), num_ranks, name))
            return torch.cat(flat.view(num_ranks, *x.shape).unbind(0), dim=dim)

        return run

    def _uneven(self, *, dim: int, sizes: Sequence[int]) -> Callable[[Tensor], Tensor]:
        num_ranks, name = len(self.ranks), self._name

        def run(x: Tensor) -> Tensor:
            at = dim % x.dim()
            rest = math.prod(x.shape[:at]) * math.prod(x.shape[at + 1 :])
            counts = [piece * rest for piece in sizes]
            sent = x.contiguous().view(-1).repeat(num_ranks)
            flat = _done(_functional.all_to_all_single(sent, counts, [x.numel()] * num_ranks, name))
            pieces = zip(torch.split(flat, counts), sizes, strict=True)
            return torch.cat([part.view(*x.shape[:at], piece, *x.shape[at + 1 :]) for part, piece in pieces], dim=at)

        return run

    def _reduce_scatter(self, *, dim: int, sizes: Sequence[int] | None = None) -> Callable[[Tensor], Tensor]:
        num_ranks, own, name, is_nccl = len(self.ranks), self.coordinate, self._name, self._group.is_nccl

        def run(x: Tensor) -> Tensor:
            found = piece_sizes(x, dim, sizes, self)
            pieces = to_pieces(x, dim, found, num_ranks)
            if is_nccl and len(set(found)) == 1:
                flat = torch.stack(list(pieces)).view(-1)
                return _done(_functional.reduce_scatter_tensor(flat, "sum", num_ranks, name)).view(pieces[own].shape)
            counts = [piece.numel() for piece in pieces]
            sent = torch.cat([piece.reshape(-1) for piece in pieces])
            flat = _done(_functional.all_to_all_single(sent, [counts[own]] * num_ranks, counts, name))
            return sum_in_order(flat.view(num_ranks, *pieces[own].shape).unbind(0))

        return run

    def _all_to_all(self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        require_counts(x, send_counts, receive_counts, self)
        return _done(_functional.all_to_all_single(x.contiguous(), list(receive_counts), list(send_counts), self._name))

    def _permute(self, *, shift: int) -> Callable[[Tensor], Handle]:
        num_ranks, own, name = len(self.ranks), self.coordinate, self._name
        if shift % num_ranks == 0:
            return Handle.done
        to, from_ = (own + shift) % num_ranks, (own - shift) % num_ranks

        def begin(x: Tensor) -> Handle:
            flat = x.contiguous().view(-1)
            sent = [flat.numel() if coordinate == to else 0 for coordinate in range(num_ranks)]
            received = [flat.numel() if coordinate == from_ else 0 for coordinate in range(num_ranks)]
            coming, shape = _functional.all_to_all_single(flat, received, sent, name), x.shape
            return Handle(lambda: _done(coming).view(shape))

        return begin


def _done(coming: Tensor) -> Tensor:
    done: Tensor = _functional.wait_tensor(coming)
    return done


# -- one operator of ours ----------------------------------------------------------------------------------------------


_numbers = itertools.count()
_channels: weakref.WeakValueDictionary[int, Channel] = weakref.WeakValueDictionary()
"""By number: an operator's arguments are tensors, numbers and text."""


class OpaqueChannel(_TracedChannel):
    """Every primitive of `eager` as one operator."""

    def __init__(self, eager: Channel, order: Tensor, *, device: torch.device) -> None:
        super().__init__(eager.axes, eager.ranks, eager.rank, node=eager.node)
        self._eager, self._order, self._device = eager, order, device
        self._number = next(_numbers)
        _channels[self._number] = eager

    def prepare(self, kind: Kind, *, overwrite: bool = False, **options: Any) -> Callable[..., Any]:
        order, device = self._order, self._device
        own, num_ranks = self.coordinate, len(self.ranks)

        def communicate(x: Tensor, numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
            # by `self`, which keeps the channel alive as long as what calls it
            found: Tensor = _communicate(x, order, self._number, kind, list(numbers), list(shape))
            return found

        def all_reduce(x: Tensor) -> Tensor:
            return communicate(x, [], x.shape)

        def all_gather(x: Tensor) -> Tensor:
            dim, sizes = options["dim"], options.get("sizes") or []
            return communicate(x, [dim, *sizes], _resized(x, dim, sum(sizes) if sizes else num_ranks * x.shape[dim]))

        def reduce_scatter(x: Tensor) -> Tensor:
            dim, sizes = options["dim"], options.get("sizes") or []
            size = sizes[own] if sizes else x.shape[dim] // num_ranks
            return communicate(x, [dim, *sizes], _resized(x, dim, size))

        def all_to_all(x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
            return communicate(x, [*send_counts, *receive_counts], _resized(x, 0, sum(receive_counts)))

        def permute(x: Tensor) -> Handle:
            return Handle.done(communicate(x, [options["shift"]], x.shape))

        def send(x: Tensor) -> Handle:
            communicate(x, [options["to"]], [0])
            return Handle.done(x)

        def receive(shape: Sequence[int], dtype: torch.dtype) -> Handle:
            of_dtype = torch.empty(0, dtype=dtype, device=device)
            return Handle.done(communicate(of_dtype, [options["from_"]], shape))

        if kind in ("send", "receive"):
            self.peer(options["to" if kind == "send" else "from_"])
        functions: dict[Kind, Callable[..., Any]] = {
            "all_reduce": all_reduce,
            "all_gather": all_gather,
            "reduce_scatter": reduce_scatter,
            "all_to_all": all_to_all,
            "permute": permute,
            "send": send,
            "receive": receive,
        }
        return functions[kind]


def _resized(x: Tensor, dim: int, size: int) -> list[int]:
    at = dim % x.dim()
    return [*x.shape[:at], size, *x.shape[at + 1 :]]


_RUN: dict[str, Callable[[Channel, Tensor, list[int], list[int]], Tensor]] = {
    "all_reduce": lambda channel, x, numbers, shape: channel.all_reduce(x),
    "all_gather": lambda channel, x, numbers, shape: channel.all_gather(x, numbers[0], numbers[1:] or None),
    "reduce_scatter": lambda channel, x, numbers, shape: channel.reduce_scatter(x, numbers[0], numbers[1:] or None),
    "all_to_all": lambda channel, x, numbers, shape: channel.all_to_all(
        x, numbers[: len(channel.ranks)], numbers[len(channel.ranks) :]
    ),
    "permute": lambda channel, x, numbers, shape: channel.permute_begin(x, numbers[0]).finish(),
    "send": lambda channel, x, numbers, shape: channel.send_begin(x, numbers[0]).finish().new_empty(0),
    "receive": lambda channel, x, numbers, shape: channel.receive_begin(shape, x.dtype, numbers[0]).finish(),
}


@torch.library.custom_op("partitioner::communicate", mutates_args=("order",))
def _communicate(
    x: Tensor, order: Tensor, channel: int, kind: str, numbers: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """`numbers`: the primitive's options. `shape`: that of what comes back, which is of the dtype of `x`."""
    found = _RUN[kind](_channels[channel], x, list(numbers), list(shape))
    return found.clone() if found is x else found.contiguous()  # an operator must not return what it is given


@_communicate.register_fake
def _(x: Tensor, order: Tensor, channel: int, kind: str, numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
    return x.new_empty(list(shape))
