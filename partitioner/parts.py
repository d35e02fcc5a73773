"""Parts: a partitioned model. One program per rank, the report, and ways to run it.

parts.simulate(input_ids=ids)       all ranks in this process, one thread each
parts.generate(ids, max_new_tokens=20)
parts.rank(1).graph_module          what rank 1 runs
parts.engine(1, communicator)       rank 1 loaded, over a communicator of your own
Engine.connect(parts)               this process's rank, under torchrun
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Generic, TypeVar, Unpack

import torch
from torch import Tensor

from partitioner.emit import Emitter
from partitioner.errors import CommunicationError, InputError, PlanError
from partitioner.mesh import Mesh
from partitioner.program import Program
from runtime.cache import cache_bytes
from runtime.communicator import Communicator
from runtime.engine import Engine
from runtime.options import Options
from runtime.rank_program import RankProgram
from runtime.simulate import Simulator
from runtime.task import Generated, Prompts, Step
from runtime.trace import Trace
from runtime.weights import WeightSource

__all__ = ["Parts"]

Report = TypeVar("Report")


class Parts(Generic[Report]):
    """See the module's docstring; `traced` is the program before any pass, for `partitioner.compare`."""

    def __init__(
        self,
        program: Program,
        report: Report,
        *,
        traced: Program | None = None,
        generation: Callable[[], Program] | None = None,
    ) -> None:
        self.program = program
        self.report = report
        self.traced = traced
        self._compile_generation = generation
        self._ranks: dict[int, RankProgram] = {}
        self._lock = threading.RLock()

    @property
    def mesh(self) -> Mesh:
        return self.program.mesh

    def rank(self, rank: int) -> RankProgram:
        coordinates = self.mesh.coordinates(rank)
        if rank not in self._ranks:
            self._ranks[rank] = self._emitter.rank(coordinates)
        return self._ranks[rank]

    @cached_property
    def _emitter(self) -> Emitter:
        return Emitter(self.program)

    @property
    def generation(self) -> Program:
        """The program that continues sequences, compiled when first asked for.

        Raises `PlanError` where the model's tokens depend on each other by more than causal attention.
        """
        return self._generation.program

    @cached_property
    def _generation(self) -> Emitter:
        if self._compile_generation is None:
            raise PlanError("these parts were made without a program for generation")
        return Emitter(self._compile_generation())

    def generation_rank(self, rank: int) -> RankProgram:
        """What `rank` runs to continue sequences; it reads the weights of `rank(rank)`."""
        with self._lock:  # simulated ranks ask at the same time
            return self._generation.rank(self.mesh.coordinates(rank))

    def engine(
        self,
        rank: int,
        communicator: Communicator,
        *,
        weights: WeightSource | None = None,
        device: str | torch.device = "cpu",
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> Engine:
        return Engine(
            self.rank(rank),
            communicator,
            weights=weights,
            device=device,
            generation=functools.partial(self.generation_rank, rank),
            compile=compile,
            cuda_graph=cuda_graph,
        )

    @cached_property
    def _simulator(self) -> Simulator:
        return Simulator([self.rank(rank) for rank in range(self.mesh.world_size)], generation=self.generation_rank)

    def simulate(self, **inputs: Tensor | None) -> Tensor:
        """Run all ranks in this process with the model's own weights, and return rank 0's result.

        Raises where the ranks do not return the same, bit by bit: they ran the same sums in the same order.
        """
        return same_on_all_ranks(self.simulate_ranks(**inputs))

    def simulate_ranks(self, **inputs: Tensor | None) -> list[Tensor]:
        """The same, with every rank's own result."""
        return self._simulator(**inputs)

    def generate(
        self, prompts: Prompts, *, attention_mask: Tensor | None = None, **options: Unpack[Options]
    ) -> Tensor | Generated:
        """Continue `prompts` on all ranks in this process; see `Engine.generate`."""
        results = self._simulator.run(lambda engine: engine.generate(prompts, attention_mask=attention_mask, **options))
        same_on_all_ranks([r.sequences if isinstance(r, Generated) else r for r in results])
        return results[0]

    def stream(
        self, prompts: Prompts, *, attention_mask: Tensor | None = None, **options: Unpack[Options]
    ) -> Iterator[Step]:
        """The same, a step at a time; see `Engine.stream`."""
        return self._simulator.stream(lambda engine: engine.stream(prompts, attention_mask=attention_mask, **options))

    def profile(self) -> AbstractContextManager[Trace]:
        """`with parts.profile() as trace:` records what all ranks do in this process; see docs/profiling.md."""
        return self._simulator.profile()

    def cache_bytes(self, *, max_batch: int, max_length: int, prefill_step: int = 512) -> list[int]:
        """Per rank, the bytes of the cache for `max_batch` sequences of up to `max_length` tokens, prompt included."""
        sizes = {"max_batch": max_batch, "max_length": max_length, "prefill_step": prefill_step}
        for name, given in sizes.items():
            if not isinstance(given, int) or isinstance(given, bool) or given < 1:
                raise InputError(f"{name} must be a whole number, at least 1; got {given!r}")
        ranks = range(self.mesh.world_size)
        step = min(prefill_step, max_length)
        return [
            cache_bytes(self.generation_rank(rank).states, max_batch=max_batch, max_length=max_length, step=step)
            for rank in ranks
        ]


def same_on_all_ranks(results: list[Tensor]) -> Tensor:
    first = results[0]
    for rank, other in enumerate(results[1:], start=1):
        if other.shape != first.shape:
            raise CommunicationError(
                f"ranks 0 and {rank} return different shapes: {list(first.shape)} and {list(other.shape)}"
            )
        if not torch.equal(first.nan_to_num(), other.nan_to_num()):
            worst = (first - other).abs().max().item()
            raise CommunicationError(
                f"ranks 0 and {rank} return different results (by up to {worst:.3g}): a collective is missing, or a "
                "weight that every rank should hold whole differs"
            )
    return first
