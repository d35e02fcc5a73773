"""Between one stage and its neighbours: what crosses, as tensors, piece by piece.

All ranks of a stage know the sizes of every piece from its inputs, so that nothing is told beside the tensors. Of what
ranks share out, a rank gets its own from the rank that had the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from partitioner.errors import InputError
from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import Channel, Handle
from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.ops.rows.token_order import TokenOrder
from runtime.program.rank_program import Crossing, RunInput, Stage

__all__ = ["Links", "shape_of", "sizes_of"]


def sizes_of(inputs: Sequence[RunInput], values: Sequence[Tensor]) -> dict[str, int]:
    """The named sizes of a run, read off its inputs."""
    return {
        name: size
        for given, value in zip(inputs, values, strict=True)
        for name, size in zip(given.shape, value.shape, strict=True)
        if isinstance(name, str)
    }


class Links:
    """One rank's ends of the connections to the stages before and after its own."""

    def __init__(self, communicator: Communicator, stage: Stage, profiler: Profiler | None) -> None:
        self.communicator, self.stage = communicator, stage
        self._profiler = profiler
        self._receiving = [self._channel(crossing) for crossing in stage.receives]
        self._sending = [self._channel(crossing) for crossing in stage.sends]
        self._new = False

    def _channel(self, crossing: Crossing) -> Channel:
        channel = self.communicator.channel("pp", node=crossing.name)
        return channel if self._profiler is None else self._profiler.watched_transfers(channel)

    def begin(self, *, new_shapes: bool) -> None:
        """Before a schedule: whether its shapes are new, so that ranks compare what they send. Alike on all ranks."""
        self._new = new_shapes

    def receive(self, sizes: Mapping[str, int]) -> list[Handle]:
        """Begins to take a piece."""
        self.communicator.begin_run(new_shapes=self._new)
        return [
            channel.receive_begin(self._shape(crossing, sizes), crossing.dtype, self.stage.index - 1)
            for channel, crossing in zip(self._receiving, self.stage.receives, strict=True)
        ]

    def send(self, values: Sequence[Tensor]) -> list[Handle]:
        """Begins to hand on a piece; the handles keep it alive."""
        self.communicator.begin_run(new_shapes=self._new)
        return [
            channel.send_begin(value.contiguous(), self.stage.index + 1)
            for channel, value in zip(self._sending, values, strict=True)
        ]

    def _shape(self, crossing: Crossing, sizes: Mapping[str, int]) -> list[int]:
        return shape_of(crossing, sizes, self.communicator.mesh, self.communicator.rank)


def shape_of(crossing: Crossing, sizes: Mapping[str, int], mesh: Mesh, rank: int) -> list[int]:
    """What crosses, on one rank of the mesh, in a run of these sizes."""
    for name in crossing.shape:
        if isinstance(name, str) and name not in sizes:
            raise InputError(f"what crosses at {crossing.name!r} has a dim {name!r}, which no input of the run tells")
    shape = [sizes[dim] if isinstance(dim, str) else dim for dim in crossing.shape]
    for rows in crossing.rows:
        own = mesh.index(rows.axes, mesh.coordinates(rank))
        shape[rows.dim] = TokenOrder.of(shape[rows.dim], mesh.size(*rows.axes), rows.order).counts[own]
    return shape
