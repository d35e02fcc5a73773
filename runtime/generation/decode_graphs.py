"""Decode steps of one shape: compiled once, or captured as a CUDA graph and replayed.

A step takes one token per sequence, [B, 1], from the same memory each time; where in its sequence a token stands is
read on the device. Where attention is a kernel that stops at each row's length, one graph serves all lengths, and what
is compiled serves any cache. Elsewhere it looks at `seen` slots, rounded up, so that a few graphs serve all lengths.
States per sequence stay in one place: a step reads and writes them there, for rows that are active.
A captured step may choose its rows' tokens too, each as its request asks: `runtime.sampling.row_sampler`.
CUDA graphs: launching a captured step costs the host microseconds instead of the launch of each of its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.communication.traceable import Traceable
from runtime.execution.executable import Executable, build
from runtime.kv_cache.cache import Cache
from runtime.program.rank_program import RankProgram
from runtime.sampling.row_sampler import Kind, RowOptions, RowSampler
from runtime.sampling.vocabulary_search import VocabularySearch

__all__ = ["Chosen", "Decoder", "GraphPool", "require_fixed_shapes"]

# a product with one row is a sum over the weights' rows, whose tiles are found by trying. By default the compiler
# computes again what several kernels use, in each of them: cosines and sines of the position in every layer, and norms
# in every row of a product
_ON_GPU: dict[str, Any] = {
    "coordinate_descent_tuning": True,
    "realize_reads_threshold": 1,
    "realize_acc_reads_threshold": 2,
}
_INPUTS = ("input_ids", "position_ids", "last", "active")
_ROUND_TO = 256
_WARM_UP = 3
_MOST_KINDS = 4
"""Of choices for which steps are captured; then one that serves all."""


class Chosen(NamedTuple):
    """What a step has come to. said: as `RowSampler.choose` has it, on the host. logits: [B, V/n], on the device."""

    said: Tensor
    logits: Tensor


def require_fixed_shapes(program: RankProgram, device: torch.device, *, cuda_graph: bool) -> None:
    """Raises InputError where steps of this program cannot be run from fixed memory."""
    if cuda_graph and device.type != "cuda":
        raise InputError(f"cuda_graph=True needs a CUDA device; this engine is on {str(device)!r}")
    others = [wanted.name for wanted in program.inputs if wanted.name not in _INPUTS]
    if others:
        raise InputError(
            "compile and cuda_graph are for models whose attention reads keys and values from a cache by itself; this "
            f"one is given the input {others[0]!r}: leave them out"
        )


class GraphPool:
    """Memory that captured steps share, of which one is replayed at a time."""

    def __init__(self) -> None:
        self._handle: Any = None

    @property
    def handle(self) -> Any:
        """What torch.cuda.graph takes."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def renew(self) -> None:
        """For when none of its graphs is left: torch captures nothing more into a pool that all graphs have left."""
        self._handle = None


class Decoder:
    """See the module's docstring; for `batch` sequences. `compile`: through torch.compile, with inductor."""

    def __init__(
        self,
        program: RankProgram,
        execute: Executable,
        cache: Cache,
        *,
        batch: int,
        device: torch.device,
        compile: bool,
        cuda_graph: bool,
        pool: GraphPool,
    ) -> None:
        self.batch, self.cache, self._pool = batch, cache, pool
        self._compiled, self._captures = compile, cuda_graph
        self._execute = execute
        self._inputs = {
            "input_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "position_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "last": torch.zeros(batch, dtype=torch.int64, device=device),
            "active": torch.ones(batch, dtype=torch.bool, device=device),
        }
        self._order = [wanted.name for wanted in program.inputs]
        self._function: Callable[..., Any] = execute.function
        if compile:
            traceable = build(program, Traceable(execute.communicator), device, cache)
            function = functools.partial(traceable, *execute.weights)
            options = _ON_GPU if device.type == "cuda" else None
            self._function = torch.compile(function, dynamic=False, options=options)
        self._compared = not compile
        """Whether the ranks have made sure that they are about to do the same: a compiled step does not."""
        self._graphs: dict[tuple[int, Kind | None, bool], tuple[Any, Any]] = {}
        """By the slots they look at, what they choose, and whether the next step goes on from there."""
        self._program, self._device = program, device
        self._rows: RowSampler | None = None
        self._kinds: list[Kind] = []

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], active: Sequence[bool] = ()) -> Tensor:
        """The logits [B, V/n] after one more token per sequence, at its position; valid until the next call.

        active: rows whose states move on; (): all.
        """
        self._set(tokens, positions, active)
        seen = self._seen(max(positions))
        if not self._compared:
            self._compare(seen)
        logits: Tensor = self._replayed(seen, None, chained=False) if self._captures else self._run(seen)
        return logits

    @property
    def rows(self) -> RowSampler:
        """What chooses in its steps."""
        if self._rows is None:
            program = self._program
            search = VocabularySearch(
                self._execute.communicator,
                vocab_size=program.vocab_size,
                owned=program.vocabulary,
                axis=program.vocabulary_axes,
                device=self._device,
            )
            # a state that has moved on cannot be taken back when the host finds that a row was not certain
            whole = not all(state.per_token for state in program.states)
            self._rows = RowSampler(search, self.batch, self._device, whole=whole)
        return self._rows

    def choose(
        self,
        rows: Sequence[RowOptions],
        tokens: Sequence[int],
        positions: Sequence[int],
        *,
        also: Sequence[RowOptions] = (),
    ) -> Chosen:
        """One more token per sequence, and the choice of the next one for the first `rows`; valid until the next call.

        All ranks along the vocabulary's axes ask alike. also: what ranks ask that have other rows, and run with this
        one: a step is captured by all of them or by none.
        """
        self._set(tokens, positions)
        kind, seen = self._kind_for(self.rows.begin(rows, also)), self._seen(max(positions))
        if not self._compared:
            self._compare(seen)
        logits, said = (
            self._replayed(seen, kind, chained=False) if self._captures else self._chosen(seen, kind, chained=False)
        )
        return Chosen(said.cpu(), logits)

    def chain(
        self, rows: Sequence[RowOptions], tokens: Sequence[int], positions: Sequence[int], count: int
    ) -> Iterator[Chosen]:
        """What `count` steps choose one after the other for `rows`.

        A step takes what the one before it has chosen without the host, and runs while the host reads it. `logits` are
        those of the yielded step, as long as the next one is not asked for.
        """
        self._set(tokens, positions)
        latest = max(positions)
        kind = self._kind_for(self.rows.begin(rows))
        keeps = not self.rows.is_certain(kind)
        if not self._compared:
            self._compare(self._seen(latest))
        started: list[tuple[Callable[[], Tensor], Tensor]] = []
        for step in range(count):
            seen = self._seen(latest + step)
            logits, said = (
                self._replayed(seen, kind, chained=True) if self._captures else self._chosen(seen, kind, chained=True)
            )
            # the next step begins before the host knows whether it needs these
            started.append((_sent(said), logits.clone() if keeps else logits))
            if step:
                yield _arrived(*started.pop(0))
        yield from (_arrived(*each) for each in started)

    def _kind_for(self, kind: Kind) -> Kind:
        """One for which steps are captured, and which serves `kind`."""
        if len(self._kinds) >= _MOST_KINDS and kind not in self._kinds:
            kind = functools.reduce(Kind.join, self._kinds, kind)
        if kind not in self._kinds:
            self._kinds.append(kind)
        return kind

    def _set(self, tokens: Sequence[int], positions: Sequence[int], active: Sequence[bool] = ()) -> None:
        self.cache.fixed_states.settle(self.cache.buffers)
        device = self._inputs["input_ids"].device
        self._inputs["active"].copy_(torch.tensor(active or [True] * self.batch))
        both = torch.tensor([tokens, positions])
        if device.type == "cuda":
            both = both.pin_memory().to(device, non_blocking=True)
        self._inputs["input_ids"].copy_(both[0, :, None])
        self._inputs["position_ids"].copy_(both[1, :, None])

    def _seen(self, latest: int) -> int:
        """How many slots a step looks at."""
        most = self.cache.max_length
        # one compiled graph only: compiling takes far longer than looking at empty slots
        return most if self._compiled or self.cache.any_length else min(most, -(-(latest + 1) // _ROUND_TO) * _ROUND_TO)

    def _replayed(self, seen: int, kind: Kind | None, *, chained: bool) -> Any:
        key = (seen, kind, chained)
        if key not in self._graphs:
            run = self._run if kind is None else functools.partial(self._chosen, kind=kind, chained=chained)
            self._graphs[key] = self._capture(run, seen)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    @torch.no_grad()
    def _chosen(self, seen: int, kind: Kind, *, chained: bool) -> tuple[Tensor, Tensor]:
        """One step and its choice; chained: as the input of the next."""
        logits = self._run(seen)
        said = self.rows.choose(logits, kind)
        if chained:
            self._inputs["input_ids"].copy_(said[0, :, None])
            self._inputs["position_ids"].add_(1)
            self.rows.advance(said, kind)
        return logits, said

    def _compare(self, seen: int) -> None:
        """One step as it is, with every collective compared; the next one does it again, and writes the same."""
        self.cache.begin_fixed(self._inputs["position_ids"], seen)
        states = self.cache.fixed_states.copies()
        self._execute([self._inputs[name] for name in self._order])
        self.cache.fixed_states.restore(states)
        self._execute.communicator.begin_run(new_shapes=False)
        self._compared = True

    def release(self) -> None:
        """Gives the captured steps back now: an error's traceback may keep this object for long."""
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    @torch.no_grad()
    def _run(self, seen: int) -> Tensor:
        self.cache.begin_fixed(self._inputs["position_ids"], seen)
        communicator = self._execute.communicator
        try:
            logits: Tensor = self._function(*(self._inputs[name] for name in self._order))
        except BaseException as error:
            reason = communicator.explained(error)
            communicator.abort(reason)
            raise reason from (None if reason is error else error)
        return logits[:, 0]

    @torch.no_grad()
    def _capture(self, run: Callable[[int], Any], seen: int) -> tuple[Any, Any]:
        # a step that is run again on the same inputs and states writes what it has written: the warm-up is free of
        # effects
        changing = [*self._inputs.values(), *([] if self._rows is None else self._rows.changing)]
        before = [given.clone() for given in changing]
        states = self.cache.fixed_states.copies()

        def warm_up() -> None:
            run(seen)
            for given, was in zip(changing, before, strict=True):
                given.copy_(was)
            self.cache.fixed_states.restore(states)

        self._execute.communicator.begin_run(new_shapes=True)
        warm_up()
        self._execute.communicator.begin_run(new_shapes=False)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                warm_up()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool.handle):
            result = run(seen)
        return graph, result


def _sent(said: Tensor) -> Callable[[], Tensor]:
    """Has it copied to the host; what waits for the copy."""
    if said.device.type != "cuda":
        copy = said.clone()
        return lambda: copy
    copy = torch.empty(said.shape, dtype=said.dtype, pin_memory=True)
    copy.copy_(said, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return copy

    return wait


def _arrived(wait: Callable[[], Tensor], logits: Tensor) -> Chosen:
    return Chosen(wait(), logits)
