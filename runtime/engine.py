"""The engine: loads one rank's slices of the weights, binds its collectives, and runs its graph.

    engine = Engine(parts.rank(1), communicator, weights=state_dict)
    logits = engine(input_ids=input_ids)

The same engine runs a rank in a process of its own and in a thread of the simulator; only the communicator differs.
"""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from partitioner.errors import CommunicationError
from partitioner.mesh import Mesh
from runtime.communicator import Communicator
from runtime.executable import build_executable, failing_node
from runtime.inputs import complete_inputs
from runtime.process_groups import ProcessGroups
from runtime.rank_program import RankProgram
from runtime.weights import WeightSource, load_weights

__all__ = ["Engine", "RankPrograms"]


class RankPrograms(Protocol):
    """What `Engine.connect` needs of a compiled model: `partitioner.Parts` is one."""

    @property
    def mesh(self) -> Mesh: ...

    def rank(self, rank: int) -> RankProgram: ...


class Engine:
    """One rank, loaded; `weights` as in `runtime.weights`, None: the data of the model that was partitioned."""

    def __init__(
        self,
        program: RankProgram,
        communicator: Communicator,
        *,
        weights: WeightSource | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if communicator.rank != program.rank or communicator.mesh != program.mesh:
            raise CommunicationError(
                f"the program is that of rank {program.rank} on {program.mesh}, "
                f"the communicator that of rank {communicator.rank} on {communicator.mesh}"
            )
        self.program = program
        self.communicator = communicator
        self.device = torch.device(device)
        self.weights = load_weights(program, weights, self.device)
        self._run = functools.partial(build_executable(program, communicator, self.device), *self.weights)
        self._seen: set[tuple[torch.Size, ...]] = set()

    @classmethod
    def connect(
        cls,
        parts: RankPrograms,
        weights: WeightSource | None = None,
        *,
        device: str | torch.device = "cpu",
        timeout_s: float = 60.0,
        check: bool = False,
    ) -> Engine:
        """The rank of a process that torchrun started; `check`: compare the ranks before every collective."""
        communicator = ProcessGroups.connect(parts.mesh, device=device, timeout_s=timeout_s, check=check)
        return cls(parts.rank(communicator.rank), communicator, weights=weights, device=communicator.device)

    def __call__(self, **inputs: Tensor | None) -> Any:
        """Run once. Every rank must be given the same inputs."""
        values = complete_inputs(self.program.inputs, inputs, self.device, self.program.limits)
        shapes = tuple(value.shape for value in values)
        self.communicator.begin_run(new_shapes=shapes not in self._seen)
        try:
            # not inference_mode: the caller may write to what comes back
            with torch.no_grad():
                result = self._run(*values)
        except BaseException as error:
            name = failing_node(error)
            for node in self.program.graph.nodes:
                if node.name == name:
                    error.add_note(
                        f"at node {name!r} of {node.meta.get('path') or 'the graph'}, rank {self.program.rank}"
                    )
            self.communicator.abort(error)
            raise
        self._seen.add(shapes)
        return result

    def close(self) -> None:
        self.communicator.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.communicator.abort(error)
        self.close()
