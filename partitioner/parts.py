"""Parts: a model just partitioned. One program per rank, with the ways to run it of `Ranks`, and the report."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from typing import Generic, TypeVar

from partitioner.emit import Emitter
from partitioner.errors import PlanError
from partitioner.mesh import Mesh
from partitioner.program import Program
from partitioner.ranks import Ranks
from runtime.rank_program import RankProgram

__all__ = ["Parts"]

Report = TypeVar("Report")


class Parts(Ranks, Generic[Report]):
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
