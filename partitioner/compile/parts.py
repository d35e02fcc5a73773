"""Parts: a model just partitioned. One program per rank, with the ways to run it of `Ranks`, and the report."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from partitioner.analysis.cost.layer_costs import LayerCosts, layer_costs
from partitioner.analysis.report.generation_report import GenerationReport, make_generation_report
from partitioner.compile.emit import Emitter
from partitioner.errors import BundleError, PlanError
from partitioner.program.model_record import ModelRecord
from partitioner.program.plan import Plan
from partitioner.program.program import Program
from partitioner.program.ranks import Entry, Ranks
from partitioner.sharding.mesh import Mesh
from partitioner.storage.bundle.save import save_ranks
from runtime.program.host_default import host_default
from runtime.program.rank_program import RankProgram, require_entry

__all__ = ["Parts"]

Report = TypeVar("Report")


class Parts(Ranks, Generic[Report]):
    """See the module's docstring.

    program: the entry "text". generation: compiles the entries "prefill" and "decode". traced: the program before any
    pass, for `partitioner.compile.compare`.
    """

    def __init__(
        self,
        program: Program,
        report: Report,
        *,
        traced: Program | None = None,
        generation: Callable[[], tuple[Program, Program]] | None = None,
        plan: Plan | None = None,
        model: ModelRecord | None = None,
    ) -> None:
        self.program = program
        self.report = report
        self.traced = traced
        self._compile_generation = generation
        self._plan, self._model = plan, model
        self._emitters: dict[int, Emitter] = {}
        self._ranks: dict[tuple[int, int], RankProgram] = {}
        self._lock = threading.RLock()

    @property
    def mesh(self) -> Mesh:
        return self.program.mesh

    @property
    def replicas(self) -> int:
        return 1 if self._plan is None else self._plan.replicas

    @host_default
    def entry(self, entry: Entry, rank: int) -> RankProgram:
        coordinates = self.mesh.coordinates(rank)
        with self._lock:  # simulated ranks ask at the same time
            program = self.program_of(entry)
            key = id(program), rank
            if key not in self._ranks:
                if id(program) not in self._emitters:
                    self._emitters[id(program)] = Emitter(program)
                self._ranks[key] = self._emitters[id(program)].rank(coordinates)
            return self._ranks[key]

    @host_default
    def program_of(self, entry: Entry) -> Program:
        """The program of all ranks; "prefill" and "decode" are compiled when first asked for.

        Raises `PlanError` where the model's tokens depend on each other by more than causal attention.
        """
        require_entry(entry)
        if entry == "text":
            return self.program
        return self._generation[entry == "decode"]

    @cached_property
    def _generation(self) -> tuple[Program, Program]:
        if self._compile_generation is None:
            raise PlanError("these parts were made without a program for generation")
        return self._compile_generation()

    @cached_property
    def generation_report(self) -> GenerationReport:
        """What each rank remembers of a sequence, split or whole and why; raises as `program_of` does."""
        ranks = self.everyone()
        decode = [self.entry("decode", rank) for rank in ranks]
        whole = [self.rank(rank) for rank in ranks]
        return make_generation_report(self.program_of("decode"), decode, whole, prefill=self.program_of("prefill"))

    @host_default
    def cost(self, entry: Entry = "prefill") -> LayerCosts:
        """What the program of an entry costs a rank, by kind of layer: expressions in batch, sequence and past.

        "decode" is read at one token per sequence. Raises as `program_of` does.
        """
        return layer_costs(self.program_of(entry), sequence=1 if entry == "decode" else 5)

    @host_default
    def save(
        self,
        folder: str | Path,
        *,
        tokenizer: str | Path | None = None,
        reference: bool = False,
        digests: bool = True,
    ) -> None:
        """Writes a bundle, which `partitioner.load` reads: graphs as data, and each rank's slices of the weights.

        `folder` must be new or empty. `tokenizer`: a folder whose tokenizer is put beside them. `reference`: weights of
        a checkpoint stay in it, and nothing is copied; without `digests` they are not even read, and the bundle can
        only be loaded with checked=False. Nothing that is written is ever run when it is read.
        Raises `BundleError` where the program is not to be written.
        """
        if self._plan is None or self._model is None:
            raise BundleError("these parts were not made by partition(): what they were made from is not known")
        save_ranks(
            self,
            folder,
            plan=self._plan,
            model=self._model,
            report=str(self.report),
            tokenizer=tokenizer,
            reference=reference,
            digests=digests,
        )
