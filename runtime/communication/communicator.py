"""The protocol between the engine and whatever carries its collectives.

    bind(op, axis, node=..)   the callable that takes a collective's place in the code of one rank
    bind_traceable(..)        the same, as torch.compile can follow it
    begin_run(new_shapes=..)  the first run of new shapes compares what the ranks are about to do before each collective
    abort(error)              this rank is failing: wake those that wait for it
    barrier(), close()

Two implementations: `process_groups.ProcessGroups` (NCCL, gloo; one process per rank) and `rendezvous.Rendezvous` (one
thread per rank). That graphs name axes and the communicator is bound late is what lets one engine serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from partitioner.errors import CommunicationError
from partitioner.sharding.mesh import AXES, Mesh

__all__ = ["Binder", "Communicator", "require_axis", "require_op", "require_piece"]


class Binder(Protocol):
    """The part of a communicator that turns a graph's collectives into functions."""

    def bind(
        self,
        op: Callable[..., Tensor],
        axis: str,
        *,
        node: str,
        options: dict[str, Any],
        overwrite: bool = False,
    ) -> Callable[[Tensor], Tensor]:
        """The operation of `node` as a callable on its tensor; `overwrite`: nobody reads that tensor afterwards."""


class Communicator(Binder, Protocol):
    """See the module's docstring."""

    mesh: Mesh
    rank: int

    def bind_traceable(
        self, op: Callable[..., Tensor], axis: str, *, node: str, options: dict[str, Any]
    ) -> Callable[[Tensor], Tensor]:
        """The same for torch.compile, which takes it into its graph; see `runtime.communication.traceable`."""

    def begin_run(self, *, new_shapes: bool) -> None: ...

    def explained(self, error: BaseException) -> BaseException:
        """What `error` means, where it comes from a collective that is bound to be compiled."""

    def abort(self, error: BaseException) -> None: ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


def require_op(op: Callable[..., Tensor], offered: dict[Callable[..., Tensor], Any], node: str) -> Any:
    """What `offered` holds for `op`, or an error that lists what there is."""
    if op not in offered:
        known = ", ".join(sorted(known.__name__ for known in offered))
        raise CommunicationError(f"node {node!r}: this communicator has no operation {op!r}; it has {known}")
    return offered[op]


def require_axis(axis: str, node: str) -> None:
    if axis not in AXES:
        raise CommunicationError(f"node {node!r} communicates over {axis!r}, which is no mesh axis; those are {AXES}")


def require_piece(x: Tensor, options: Mapping[str, Any], coordinate: int, *, node: str, rank: int) -> None:
    """Raise where this rank's piece of an uneven all_gather is not as long as the graph says."""
    sizes, dim = options.get("sizes"), options.get("dim")
    if sizes is not None and dim is not None and x.shape[dim] != sizes[coordinate]:
        raise CommunicationError(
            f"rank {rank}: node {node!r} gathers pieces of {list(sizes)} along dim {dim}, so this rank must bring "
            f"{sizes[coordinate]}; its tensor is {list(x.shape)}"
        )
