"""Ranks: a model as one program per rank, whether just compiled (Parts) or loaded (Bundle), and ways to run it.

ranks.simulate(input_ids=ids)            all ranks in this process, one thread each
ranks.generate(ids, max_new_tokens=20)
ranks.rank(1).graph_module               what rank 1 runs
ranks.engine(1, communicator)            rank 1 loaded, over a communicator of your own
Engine.connect(ranks)                    this process's rank, under torchrun
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from typing import Unpack

import torch
from torch import Tensor

from partitioner.errors import CommunicationError, InputError
from partitioner.sharding.mesh import Mesh
from runtime.communication.communicator import Communicator
from runtime.engine.engine import Engine
from runtime.engine.replicas import deal, merged, work_of
from runtime.engine.simulator import Simulator
from runtime.execution.chrome_trace import Trace
from runtime.generation.generation_options import Options
from runtime.generation.generation_request import Generated, GenerationRequest, Prompts, Step
from runtime.kv_cache.cache_size import CacheSize, Room, bytes_needed, in_float8, tokens_that_fit
from runtime.kv_cache.device_memory import Amount
from runtime.processes.capacity import require_memory, require_threads
from runtime.program.host_default import host_default, host_default_steps
from runtime.program.rank_program import Entry, RankProgram
from runtime.program.shards import WeightSource

__all__ = ["Entry", "Ranks", "same_on_all_ranks"]

_NODE_BYTES = 128
"""What a node of a graph takes for each rank at the least, where it shares all that it can with other ranks."""


class Ranks(ABC):
    """See the module's docstring."""

    @property
    @abstractmethod
    def mesh(self) -> Mesh: ...

    @property
    def replicas(self) -> int:
        """How many independent copies of these ranks there are, each with process groups of its own."""
        return 1

    @abstractmethod
    def entry(self, entry: Entry, rank: int) -> RankProgram:
        """What `rank` runs on whole texts ("text"), on prompts ("prefill") or on single tokens ("decode").

        All read the same weights; the last two are the same object where the plan makes no difference between them.
        Raises PlanError where there is no such program.
        """

    def rank(self, rank: int) -> RankProgram:
        """What `rank` runs on whole texts."""
        return self.entry("text", rank)

    def everyone(self) -> range:
        """The number of each rank. Raises InputError where this machine has no memory for a program of each."""
        num_ranks = self.mesh.world_size
        each = len(self.rank(0).graph.nodes) * _NODE_BYTES
        require_memory(num_ranks, num_ranks * each, f"each rank's program takes at least {each >> 10} KB")
        return range(num_ranks)

    @host_default
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
            entries=lambda entry: self.entry(entry, rank),
            compile=compile,
            cuda_graph=cuda_graph,
        )

    @cached_property
    def _simulators(self) -> list[Simulator]:
        """One per replica."""
        require_threads(self.mesh.world_size * self.replicas)
        programs = [self.rank(rank) for rank in self.everyone()]
        return [Simulator(programs, entries=self.entry) for _ in range(self.replicas)]

    @property
    def _simulator(self) -> Simulator:
        """The one of the first replica."""
        return self._simulators[0]

    def simulate(self, **inputs: Tensor | bool | None) -> Tensor:
        """Run all ranks in this process with the model's own weights, and return the result of the first that has it.

        Raises where ranks do not return the same, bit by bit: they ran the same sums in the same order.
        """
        return same_on_all_ranks([result for result in self.simulate_ranks(**inputs) if result is not None])

    @host_default
    def simulate_ranks(self, **inputs: Tensor | bool | None) -> list[Tensor | None]:
        """The same, with every rank's own result: that of several stages is with the last. Every replica runs it."""
        return [result for simulator in self._simulators for result in simulator(**inputs)]

    @host_default
    def generate(
        self, prompts: Prompts | None = None, *, attention_mask: Tensor | None = None, **options: Unpack[Options]
    ) -> Tensor | Generated:
        """Continue `prompts` on all ranks in this process; see `Engine.generate`."""
        if self.replicas > 1:
            return self._generate_on_replicas(prompts, attention_mask, options)
        results = self._simulator.run(lambda engine: engine.generate(prompts, attention_mask=attention_mask, **options))
        same_on_all_ranks([r.sequences if isinstance(r, Generated) else r for r in results])
        return results[0]

    def _generate_on_replicas(
        self, prompts: Prompts | None, attention_mask: Tensor | None, options: Options
    ) -> Tensor | Generated:
        """Each replica its rows, one after the other. All get their turn; the first that failed is told then."""
        request = self._simulator.engines[0].request(prompts, attention_mask=attention_mask, **options)
        dealt = deal(work_of(request), replicas=self.replicas)
        found: list[list[Step]] = []
        failures: list[BaseException] = []
        for number, (simulator, rows) in enumerate(zip(self._simulators, dealt, strict=True)):
            try:
                found.append(simulator.run(partial(_steps, request.of_rows(rows)))[0] if rows else [])
            except BaseException as error:
                error.add_note(f"replica {number}")
                failures.append(error)
        if failures:
            raise failures[0]
        return request.result(merged(found, dealt))

    def stream(
        self, prompts: Prompts | None = None, *, attention_mask: Tensor | None = None, **options: Unpack[Options]
    ) -> Iterator[Step]:
        """The same, a step at a time; see `Engine.stream`."""
        if self.replicas > 1:
            return host_default_steps(self._stream_on_replicas(prompts, attention_mask, options))
        steps = self._simulator.stream(lambda engine: engine.stream(prompts, attention_mask=attention_mask, **options))
        return host_default_steps(steps)

    def _stream_on_replicas(
        self, prompts: Prompts | None, attention_mask: Tensor | None, options: Options
    ) -> Iterator[Step]:
        request = self._simulator.engines[0].request(prompts, attention_mask=attention_mask, **options)
        dealt = deal(work_of(request), replicas=self.replicas)
        with contextlib.ExitStack() as stack:
            streams = []
            for simulator, rows in zip(self._simulators, dealt, strict=True):
                steps = simulator.stream(partial(_stream, request.of_rows(rows))) if rows else iter(())
                streams.append(stack.enter_context(contextlib.closing(steps)) if rows else steps)  # type: ignore[type-var]
            while any(found := [[step for step in [next(steps, None)] if step is not None] for steps in streams]):
                yield merged(found, dealt)[0]

    @host_default
    def log_probabilities(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Of each token of `texts` after those before it, [B, L - 1]; see `Engine.log_probabilities`."""
        return same_on_all_ranks(self._simulator.run(lambda engine: engine.log_probabilities(texts)))

    def profile(self, *, by_node: bool = True) -> AbstractContextManager[Trace]:
        """`with ranks.profile() as trace:` records what all ranks do in this process; see `Engine.profile`."""
        return self._simulator.profile(by_node=by_node)

    @host_default
    def reserve(self, size: CacheSize) -> Room:
        """Sets the caches of all ranks in this process aside; see `Engine.reserve`."""
        rooms = [simulator.run(lambda engine: engine.reserve(size)) for simulator in self._simulators]
        return rooms[0][0]

    def cache_bytes(
        self, *, max_batch: int, max_length: int, prefill_step: int = 512, dtype: str | None = None
    ) -> list[int]:
        """Per rank, the bytes of the cache for `max_batch` sequences of up to `max_length` tokens, prompt included.

        dtype: as in `CacheSize`.
        """
        # checks them
        CacheSize(max_batch=max_batch, max_length=max_length, prefill_step=prefill_step, dtype=dtype)
        return [
            bytes_needed(
                self._held_as(rank, dtype), max_batch=max_batch, max_length=max_length, prefill_step=prefill_step
            )
            for rank in self.everyone()
        ]

    def _held_as(self, rank: int, dtype: str | None) -> RankProgram:
        program = self.entry("prefill", rank)
        return program if dtype is None else in_float8(program)

    def tokens_that_fit(
        self, memory: int | str, *, max_batch: int = 1, prefill_step: int = 512, dtype: str | None = None
    ) -> list[int | None]:
        """Per rank, the most tokens per sequence whose cache fits into `memory`: bytes, or a size such as "4 GB".

        The ranks can use the least of these. None: any number, as what the model remembers does not grow. A share of
        what is free on a device is for an engine's `reserve`, which runs there. dtype: as in `CacheSize`.
        """
        CacheSize(max_batch=max_batch, memory=memory, prefill_step=prefill_step, dtype=dtype)
        room = Amount.of(memory).bytes
        if room is None:
            raise InputError(
                f"memory={memory!r}: what is free is known where a rank runs; give bytes here, or "
                "engine.reserve(CacheSize(memory=...)) there"
            )
        return [
            tokens_that_fit(self._held_as(rank, dtype), room, max_batch=max_batch, prefill_step=prefill_step)
            for rank in self.everyone()
        ]


def _stream(request: GenerationRequest, engine: Engine) -> Iterator[Step]:
    return engine.steps(request)


def _steps(request: GenerationRequest, engine: Engine) -> list[Step]:
    return list(engine.steps(request))


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
