"""The interface between the engine and whatever carries what the ranks do together.

    channel(axes, node=..)            the primitives, over the group along these axes
    bind(op, axis, node=..)           the callable that takes a communicating op's place in the code of one rank
    traceable_channel(axes, node=..)  the primitives as torch.compile can follow them
    begin_run(new_shapes=..)          the first run of new shapes compares what the ranks are about to do before they do
    abort(error)                      this rank is failing: wake those that wait for it
    barrier(), close()

Two implementations: `process_groups.ProcessGroups` (NCCL, gloo; one process per rank) and
`thread_communicator.ThreadCommunicator` (one thread per rank). That graphs name axes and the communicator is bound late
is what lets one engine serve both.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import CommunicationError, PlanError
from partitioner.sharding.mesh import Mesh, view_of
from runtime.communication.channels import Channel
from runtime.ops.collectives import all_gather
from runtime.ops.communicating import COMMUNICATING, Axes, as_axes, axes_text
from runtime.program.rank_program import RankProgram

__all__ = ["Binder", "Communicator", "all_stages", "gather_all", "require_axes"]


class Binder(abc.ABC):
    """The part of a communicator that turns a graph's communicating ops into functions."""

    @abc.abstractmethod
    def channel(self, axes: Axes, *, node: str) -> Channel:
        """The primitives over the ranks that differ in `axes` only; `node` stands in errors."""

    def bind(
        self, op: Callable[..., Any], axis: Axes, *, node: str, options: Mapping[str, Any], overwrite: bool = False
    ) -> Callable[..., Any]:
        """The operation of `node` as a callable on its operands; `overwrite`: nobody reads them afterwards."""
        if op not in COMMUNICATING:
            known = ", ".join(sorted(known.__name__ for known in COMMUNICATING))
            raise CommunicationError(f"node {node!r}: this communicator has no operation {op!r}; it has {known}")
        row, channel = COMMUNICATING[op], self.channel(axis, node=node)
        if row.primitive is not None:
            return channel.prepare(row.primitive, overwrite=overwrite, **options)

        def run(*operands: Any) -> Any:  # generated code calls functions
            return row.run(channel, *operands, **options)

        return run


class Communicator(Binder):
    """See the module's docstring."""

    mesh: Mesh
    rank: int
    can_be_captured: bool = False
    """Whether what its channels do between GPUs may stand in a CUDA graph, and need not be compared each time."""
    replicas_here: int = 1
    """How many replicas of these ranks share this host's memory."""

    @abc.abstractmethod
    def traceable_channel(self, axes: Axes, *, node: str) -> Channel:
        """The same for torch.compile, which takes it into its graph; see `runtime.communication.traceable`."""

    @abc.abstractmethod
    def begin_run(self, *, new_shapes: bool) -> None: ...

    @abc.abstractmethod
    def explained(self, error: BaseException) -> BaseException:
        """What `error` means, where it comes from a collective that is bound to be compiled."""

    @abc.abstractmethod
    def abort(self, error: BaseException) -> None: ...

    @abc.abstractmethod
    def barrier(self) -> None: ...

    @abc.abstractmethod
    def close(self) -> None: ...


def gather_all(communicator: Communicator, mine: Tensor) -> Tensor:
    """What every rank of the mesh brings, one after the other along the first dim; a collective of all of them."""
    communicator.begin_run(new_shapes=True)
    for axes in communicator.mesh.single_axes:
        mine = communicator.bind(all_gather, axes, node="agreement", options={"dim": 0})(mine)
    return mine


def all_stages(said: bool, program: RankProgram, communicator: Communicator, device: torch.device) -> bool:
    """Whether the ranks of all stages say so; a collective where there are stages."""
    if program.stage is None:
        return said
    return bool(gather_all(communicator, torch.tensor([int(said)], device=device)).all())


def require_axes(axes: Axes, node: str) -> tuple[str, ...]:
    """`axes` as a tuple, or an error that lists what axes there are."""
    found = as_axes(axes)
    try:
        view_of(found)
    except PlanError as error:
        raise CommunicationError(f"node {node!r} communicates over {axes_text(found)}: {error}") from None
    if not found:
        raise CommunicationError(f"node {node!r} communicates over no axis: it must name one")
    return found
