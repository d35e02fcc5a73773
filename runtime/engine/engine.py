"""The engine: loads one rank's slices of the weights, binds its collectives, and runs its graph.

    engine = Engine(parts.rank(1), communicator, weights=state_dict)
    logits = engine(input_ids=input_ids)
    tokens = engine.generate(input_ids, max_new_tokens=20)

The same engine runs a rank in a process of its own and in a thread of the simulator; only the communicator differs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Unpack, get_args

import torch
from torch import Tensor

from partitioner.errors import CommunicationError, InputError, PlanError
from partitioner.sharding.mesh import Mesh
from runtime.communication.communicator import Communicator
from runtime.communication.process_groups import ProcessGroups, Sharing
from runtime.engine.check_inputs import complete_inputs
from runtime.engine.cross_host import warn_cross_host
from runtime.engine.replicas import ReplicaResults, deal, merged, work_of
from runtime.execution.chrome_trace import Trace, from_all_ranks
from runtime.execution.executable import Executable
from runtime.execution.merge_linears import lay_side_by_side, merge_linears
from runtime.execution.profile import Profiler
from runtime.execution.routing import Routing
from runtime.generation.batching.batch_loop import BatchLoop
from runtime.generation.generate_loop import GenerateLoop
from runtime.generation.generation_options import Options
from runtime.generation.generation_request import Generated, GenerationRequest, Prompts, Step
from runtime.generation.steps import Loaded
from runtime.kv_cache.cache_size import CacheSize, Room
from runtime.ops.communicating import named_axes
from runtime.pipeline.head import HeadOfAll
from runtime.pipeline.run_schedule import StagedExecutable
from runtime.processes.place import Place
from runtime.program.bundle_errors import attribute_errors
from runtime.program.host_default import host_default, host_default_steps
from runtime.program.rank_program import Entry, RankProgram
from runtime.program.shards import WeightSource
from runtime.weights.load_weights import load_weights
from runtime.weights.scale_indices import require_scales

__all__ = ["Engine", "RankPrograms"]


class RankPrograms(Protocol):
    """What `Engine.connect` needs of a compiled model: `partitioner.Parts` is one."""

    @property
    def mesh(self) -> Mesh: ...

    @property
    def replicas(self) -> int: ...

    def entry(self, entry: Entry, rank: int) -> RankProgram: ...


def group_axes(parts: RankPrograms, rank: int) -> set[tuple[str, ...]]:
    """The axes, and tuples of axes, that any entry of `rank` communicates over: groups are made before all runs."""
    mesh = parts.mesh
    axes = set(mesh.single_axes)
    if len(mesh.degrees) < 2:
        return axes  # any other tuple has the same ranks as the one axis
    for entry in get_args(Entry):
        with contextlib.suppress(PlanError):  # a model that cannot generate: who asks it to is told so
            program = parts.entry(entry, rank)
            axes.update(named_axes([program.graph, *([] if program.of_head is None else [program.of_head.graph])]))
            axes.add(program.vocabulary_axes)
    return axes


class Engine:
    """One rank, loaded.

    - weights: as in `runtime.weights.load_weights`. None: those that the program came with.
    - entries: makes the rank's programs for generation, "prefill" and "decode", when it is first asked for them.
    - compile: put decode steps through torch.compile. cuda_graph: capture them. Both make the first steps slow, and
      merge small linears of one input (`runtime.execution.merge_linears`).
    """

    @host_default
    def __init__(
        self,
        program: RankProgram,
        communicator: Communicator,
        *,
        weights: WeightSource | None = None,
        device: str | torch.device = "cpu",
        entries: Callable[[Entry], RankProgram] | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        if communicator.rank != program.rank or communicator.mesh != program.mesh:
            raise CommunicationError(
                f"the program is that of rank {program.rank} on {program.mesh}, "
                f"the communicator that of rank {communicator.rank} on {communicator.mesh}"
            )
        self.program = program
        self.communicator = communicator
        self.device = torch.device(device)
        self._source = program.source if weights is None else weights
        with attribute_errors(program):
            self.weights = load_weights(
                program.weights, program.weight_data, self._source, self.device, progress=communicator.rank == 0
            )
            require_scales(program.weights, self.weights)
            if compile or cuda_graph:
                lay_side_by_side(program, self.weights)
            self.profiler = Profiler(program, self.device)
            executable = Executable(program, self.weights, communicator, self.device, profiler=self.profiler)
            head = HeadOfAll.of(program, self.weights, communicator, self.device, self.profiler)
            self._run = executable if program.stage is None else StagedExecutable(executable, head)
        self._entries = entries
        self._replicas: ReplicaResults | None = None
        """Where this engine's rank is one of several replicas'."""
        self._decoding = {"compile": compile, "cuda_graph": cuda_graph}

    @classmethod
    @host_default
    def connect(
        cls,
        parts: RankPrograms,
        weights: WeightSource | None = None,
        *,
        device: str | torch.device = "cpu",
        timeout_s: float = 60.0,
        check: bool = False,
        shared_memory: Sharing = "auto",
        compile: bool = False,
        cuda_graph: bool = False,
        cache: CacheSize | None = None,
    ) -> Engine:
        """The engine of a process that torchrun or Slurm started. Each replica has as many ranks as `parts.mesh`.

        - device: "cpu", "cuda" (the GPU of the local rank), or "auto": GPUs if this host has one for each of its ranks.
        - timeout_s: how long a rank waits for another. check: compare the ranks before every collective.
        - shared_memory: "auto", "on" or "off" (`runtime.communication.process_groups`).
        - cache: allocate this at once, see `reserve`.

        In a script that has several engines, or process groups of its own, all ranks connect in the same order.
        """
        place = Place.here(parts.mesh, replicas=parts.replicas)
        communicator = ProcessGroups.connect(
            parts.mesh,
            place=place,
            axes=group_axes(parts, place.rank),
            device=device,
            timeout_s=timeout_s,
            check=check,
            shared_memory=shared_memory,
        )
        results = None
        try:
            if communicator.meeting is not None and place.replicas > 1 and place.is_together:
                results = ReplicaResults(communicator.meeting, timeout_s=timeout_s)
            engine = cls(
                parts.entry("text", communicator.rank),
                communicator,
                weights=weights,
                device=communicator.device,
                entries=lambda entry: parts.entry(entry, communicator.rank),
                compile=compile,
                cuda_graph=cuda_graph,
            )
            engine._replicas = results
            with attribute_errors(engine.program):
                warn_cross_host(engine.program, communicator)
            if cache is not None:
                engine.reserve(cache)
        except BaseException as error:
            # the others would wait for this rank as long as its process lives
            if results is not None:
                results.failed(error)
                results.close()
            communicator.abort(error)
            communicator.close()
            raise
        return engine

    @property
    def mesh(self) -> Mesh:
        return self.program.mesh

    @host_default
    def __call__(self, **inputs: Tensor | bool | None) -> Any:
        """Run once. Every rank must be given the same inputs. Of several stages, the last has the result, the others
        None; all have it, where they share out the vocabulary head.
        """
        with attribute_errors(self.program):
            return self._run(complete_inputs(self.program.inputs, inputs, self.device, self.program.limits))

    @host_default
    def generate(
        self, prompts: Prompts | None = None, *, attention_mask: Tensor | None = None, **options: Unpack[Options]
    ) -> Tensor | Generated:
        """Continues prompts. Returns them with the new tokens, [B, L + new], as transformers' `generate` does.

        - prompts (or input_ids): ids [B, L], with an attention_mask if they are padded (on either side), or a list of
          rows of any lengths, which are returned padded on the left.
        - options: see `runtime.generation.generation_options`.

        Every rank must be given the same, and returns the same. Replicas share out the rows.
        """
        request = self.request(prompts, attention_mask=attention_mask, **options)
        with attribute_errors(self.program):
            return request.result(list(self._steps(request)))

    def stream(
        self, prompts: Prompts | None = None, *, attention_mask: Tensor | None = None, **options: Unpack[Options]
    ) -> Iterator[Step]:
        """The same, a step at a time: one token per sequence. Replicas that torchrun started yield all steps at the
        end.
        """
        request = self.request(prompts, attention_mask=attention_mask, **options)
        return host_default_steps(self._attributed(self._steps(request)))

    def _steps(self, request: GenerationRequest) -> Iterator[Step]:
        if self._replicas is None:
            yield from self._generate_loop.steps(request)
            return
        request.require_fits(self._generate_loop.program, request.longest)
        dealt = deal(work_of(request), replicas=self._replicas.place.replicas)
        mine = dealt[self._replicas.place.replica]
        steps = list(self._generate_loop.steps(request.of_rows(mine))) if mine else []
        yield from merged(self._replicas.exchange(steps), dealt)

    @host_default
    def log_probabilities(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Of each token of `texts`, which are of one length L, after those before it: [B, L - 1] float64.

        Each text runs token by token over the cache, so that what the cache keeps of a token counts. Every rank must be
        given the same, and returns the same.
        """
        lengths = {len(text) for text in texts}
        if len(lengths) != 1 or min(lengths) < 2:
            raise InputError(f"texts must be of one length, at least 2 tokens; got {sorted(lengths)}")
        request = self.request(
            [list(text[:1]) for text in texts],
            max_new_tokens=lengths.pop() - 1,
            logprobs=True,
            do_sample=False,
            eos_token_id=[],
            request_ids=list(range(len(texts))),
        )
        with attribute_errors(self.program):
            found = request.result(list(self._generate_loop.steps(request, given=texts)))
        assert isinstance(found, Generated)
        return found.logprobs

    def steps(self, request: GenerationRequest) -> Iterator[Step]:
        """What this rank's replica says of a request that is checked already."""
        return host_default_steps(self._attributed(self._generate_loop.steps(request)))

    def batching(
        self, size: CacheSize | None = None, *, rows: int | None = None, vocabulary: str | None = None
    ) -> BatchLoop:
        """Many requests at once, which come and go between steps; see `runtime.generation.batching.batch_loop`.

        Every rank of a replica must do the same with its own. size: of the cache, which is set aside by the first
        request; rows: how many sequences run at a time, None for the `max_batch` of `size`. vocabulary: what tokens
        say, for requests with a grammar (`runtime.sampling.grammar`).
        """
        with attribute_errors(self.program):
            return self._generate_loop.batching(size, rows=rows, vocabulary=vocabulary)

    def _attributed(self, steps: Iterator[Step]) -> Iterator[Step]:
        with attribute_errors(self.program):
            yield from steps

    @host_default
    def reserve(self, size: CacheSize) -> Room:
        """Allocates the cache of all later calls, and says how many tokens fit. Every rank must be given the same.

        Without it, each call allocates its own. Raises InputError on all ranks if it does not fit on one.
        """
        with attribute_errors(self.program):
            return self._generate_loop.reserve(size)

    @property
    def room(self) -> Room | None:
        """How many tokens fit into what `reserve` has set aside; None: nothing is."""
        return self._generate_loop.room

    @host_default
    def request(
        self, prompts: Prompts | None = None, *, attention_mask: Tensor | None = None, **options: Unpack[Options]
    ) -> GenerationRequest:
        """Prompts and options of `generate`, checked, with what the model's own configuration adds."""
        program = self._generate_loop.program
        return GenerationRequest.of(
            prompts, attention_mask, options, eos_token_id=program.eos_token_id, model=program.generation
        )

    @functools.cached_property
    def _generate_loop(self) -> GenerateLoop:
        if self._entries is None:
            raise InputError("this engine was made without programs for generation: give it entries=")
        prefill, decode = self._entries("prefill"), self._entries("decode")
        with attribute_errors(prefill):
            loaded = self._loaded(prefill)
            return GenerateLoop(
                loaded,
                loaded if decode is prefill else self._loaded(decode),
                self.communicator,
                self.device,
                profiler=self.profiler,
                **self._decoding,
            )

    def _loaded(self, program: RankProgram) -> Loaded:
        """A program with its weights, which are those of the program for whole texts as far as they are the same."""
        mine = dict(zip(self.program.weights, self.weights, strict=True))
        # the same slices of the same weights, unless a user's pass saw to something else; what no checkpoint holds is
        # small, and two traces may give one name to two constants
        missing = [w for w in program.weights if w not in mine or (w.source != "checkpoint" and w.digest is None)]
        mine |= zip(missing, load_weights(missing, program.weight_data, self._source, self.device), strict=True)
        weights = [mine[weight] for weight in program.weights]
        if missing:
            require_scales(program.weights, weights)
        if any(self._decoding.values()):
            program, weights = merge_linears(program, weights)
        return Loaded(program, weights)

    @contextlib.contextmanager
    def profile(self, *, by_node: bool = True) -> Iterator[Trace]:
        """Records what the ranks do in the block. Every rank must enter it, and has the trace of all ranks afterwards.

        by_node: record each node, or each run as a whole, which costs no time in the run. Raises InputError if decode
        steps are compiled or captured: those have no nodes.
        """
        self.require_nodes()
        self.profiler.start(by_node=by_node)
        trace = Trace()
        try:
            yield trace
        finally:
            recorded = self.profiler.stop()
        trace.complete(from_all_ranks(recorded, self.communicator, self.device))

    @contextlib.contextmanager
    def routing(self) -> Iterator[Routing]:
        """Counts how many tokens go to which experts in the block, on this rank; the ranks' counts add up.

        Raises InputError where decode steps are compiled or captured, as `profile` does.
        """
        self.require_nodes()
        self.profiler.routing = counted = Routing()
        before = self.profiler.overflow.snapshot()
        try:
            yield counted
        finally:
            self.profiler.routing = None
            for path, total in self.profiler.overflow.snapshot().items():
                counted.left_out[path] = total - before[path] if path in before else total

    def require_nodes(self) -> None:
        used = [name for name, wanted in self._decoding.items() if wanted]
        if used:
            raise InputError(f"profiling runs node by node, and this engine was made with {used[0]}=True: leave it out")

    def close(self) -> None:
        """Ends this rank's part in what the ranks do together; may be called again."""
        generate_loop = self.__dict__.pop("_generate_loop", None)
        if generate_loop is not None:
            # CUDA graphs hold collectives of the groups, which cannot be destroyed before them
            generate_loop.release()
        if self._replicas is not None:
            self._replicas.close()
        self.communicator.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            if self._replicas is not None:
                self._replicas.failed(error)
            if "_generate_loop" in self.__dict__:
                self._generate_loop.abandon()
            self.communicator.abort(error)
        self.close()
