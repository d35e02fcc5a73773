"""Decode steps of one shape: compiled once, or captured as a CUDA graph and replayed.

A step takes one token per sequence, [B, 1], from the same memory each time; where in its sequence a token stands is
read on the device. Where attention is a kernel that stops at each row's length, one graph serves all lengths, and what
is compiled serves any cache. Elsewhere it looks at `seen` slots, rounded up, so that a few graphs serve all lengths.
States per sequence stay in one place: a step reads and writes them there, for rows that are active.
A captured step may choose its rows' tokens too, each as its request asks (`runtime.sampling.row_sampler`), and tell all
ranks that have sequences of their own.
Over stages, groups of rows have steps of their own (`runtime.generation.decode_graphs.stage_decoder`).
CUDA graphs: launching a captured step costs the host microseconds instead of the launch of each of its kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.execution.cuda_graphs import GraphPool, captured, to_host
from runtime.execution.executable import Executable
from runtime.execution.prompts.inputs import on_device
from runtime.kv_cache.cache import Cache
from runtime.ops.collectives import all_gather
from runtime.ops.kernels.triton_needs import replayed
from runtime.pipeline.head import HeadOfAll
from runtime.pipeline.message import Box
from runtime.program.rank_program import RankProgram
from runtime.sampling.row_sampler import Kind, RowOptions, RowSampler
from runtime.sampling.vocabulary_search import VocabularySearch

__all__ = ["LOGITS", "Begun", "Chosen", "Decoder", "FixedStep", "require_fixed_shapes"]

FixedStep = tuple[Literal["logits", "choice", "turn", "message", "head"], Kind | None, bool]
"""What is run: a step; a step that chooses, of which kind, and whether the next one goes on from there. Over stages: a
turn, or a step, between inbox and outbox; what all choose from a head that they share out, of which kind, or as turns.
"""
LOGITS: FixedStep = ("logits", None, False)

_INPUTS = ("input_ids", "position_ids", "last", "active")
_ROUND_TO = 256
_WARM_UP = 3
_MOST_KINDS = 4
"""Of choices for which steps are captured; then one that serves all."""


class Chosen(NamedTuple):
    """What a step has come to. said: as `RowSampler.choose` has it, on the host. logits: [B, V/n], on the device."""

    said: Tensor
    logits: Tensor


@dataclass
class Begun:
    """A step that chooses, under way. wait: for what `RowSampler.choose` has said, on the host; latest: last position.

    logits: [B, V/n], on the device; until the next step begins, other than by `Decoder.again`.
    """

    wait: Callable[[], Tensor]
    logits: Tensor
    kind: Kind
    latest: int


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


class Decoder:
    """See the module's docstring; for `batch` sequences.

    compiled: what runs the step, where it is compiled. rows: those of the cache; None: the first, or those that it has
    been told. Over stages, what comes from the one before is read from `inbox`.
    """

    def __init__(
        self,
        program: RankProgram,
        execute: Executable,
        cache: Cache,
        *,
        batch: int,
        rows: slice | None = None,
        device: torch.device,
        compiled: Callable[..., Any] | None,
        cuda_graph: bool,
        pool: GraphPool,
        head: HeadOfAll | None = None,
        group: int = 0,
    ) -> None:
        """group: which rows of a cache in blocks, where several groups have steps of their own."""
        self.batch, self.cache, self.group, self._rows, self._pool = batch, cache, group, rows, pool
        self._is_compiled, self._captures = compiled is not None, cuda_graph
        self._execute, self._head = execute, head
        self._inputs = {
            "input_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "position_ids": torch.zeros(batch, 1, dtype=torch.int64, device=device),
            "last": torch.zeros(batch, dtype=torch.int64, device=device),
            "active": torch.ones(batch, dtype=torch.bool, device=device),
        }
        stage = program.stage
        self.inbox = Box(() if stage is None else stage.receives, batch, device)
        self._is_last = stage is None or stage.index + 1 == stage.count
        self._hands_on = () if stage is None else stage.sends
        if self._is_last and program.shared_head is not None:
            self._hands_on = program.shared_head.receives
        self._of_run = [self._inputs[wanted.name] for wanted in program.inputs]
        self._given = [*self._of_run, *self.inbox.values]
        self._function: Callable[..., Any] = execute.function if compiled is None else compiled
        self._compared = compiled is None
        """Whether the ranks have made sure that they are about to do the same: a compiled step does not."""
        self._graphs: dict[tuple[int, FixedStep], tuple[Any, Any]] = {}
        """By the slots they look at."""
        self._program, self._device = program, device
        self._row_sampler: RowSampler | None = None
        self._of_all: Callable[[Tensor], Tensor] | None = None
        """Brings together what all ranks that have sequences of their own bring, [1, ..]."""
        if program.batch_axes:
            bind = execute.communicator.bind
            self._of_all = bind(all_gather, program.batch_axes, node="tokens", options={"dim": 0})
        self._kinds: list[Kind] = []

    def __call__(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        active: Sequence[bool] = (),
        received: Sequence[Tensor] = (),
        *,
        latest: int = 0,
    ) -> Any:
        """The logits [B, V/n] after one more token per sequence, at its position; valid until the next call.

        active: rows whose states move on; (): all. received: what comes from the stage before, of all rows or the first
        ones; of a stage that hands on, a tuple comes back. latest: the largest position of ranks that run with this
        one: all look at as many slots, so that all capture the same step at the same time.
        """
        self._receive(received)
        self._set(tokens, positions, active)
        seen = self._seen(max(*positions, latest))
        self._compare(seen)
        return self._done(seen, LOGITS)

    def _receive(self, received: Sequence[Tensor]) -> None:
        """Of all rows, or of the first ones."""
        for held, given in zip(self.inbox.values, received, strict=True):
            held[tuple(slice(size) for size in given.shape)].copy_(given)

    def of_first(
        self,
        count: int,
        tokens: Sequence[int],
        positions: Sequence[int],
        received: Sequence[Tensor] = (),
        *,
        latest: int = 0,
    ) -> Any:
        """As a run of the first `count` sequences has it: logits [count, 1, V/n], or what the stage hands on."""
        made = self(tokens, positions, received=received, latest=latest)
        if not isinstance(made, tuple):
            return made[:count, None]
        return tuple(
            value.narrow(crossing.shape.index("batch"), 0, count) if "batch" in crossing.shape else value
            for value, crossing in zip(made, self._hands_on, strict=True)
        )

    @property
    def rows(self) -> RowSampler:
        """What chooses in its steps."""
        if self._row_sampler is None:
            program = self._program
            search = VocabularySearch.of(program, self._execute.communicator, self._device)
            # a state that has moved on cannot be taken back when the host finds that a row was not certain
            whole = not all(state.per_token for state in program.states)
            self._row_sampler = RowSampler(search, self.batch, self._device, whole=whole)
        return self._row_sampler

    def begin(
        self,
        rows: Sequence[RowOptions],
        tokens: Sequence[int],
        positions: Sequence[int],
        *,
        also: Sequence[RowOptions] = (),
        latest: int = 0,
    ) -> Begun:
        """One more token per sequence, and the choice of the next one for the first `rows`, under way.

        All ranks along the vocabulary's axes ask alike. also, latest: what ranks ask that have other rows, and run with
        this one, and their largest position: a step is captured by all of them or by none.
        """
        self._set(tokens, positions)
        kind, latest = self._kind_for(self.rows.begin(rows, also)), max(*positions, latest)
        self._compare(self._seen(latest))
        return self._begun(kind, latest)

    def again(self, begun: Begun, *, keeps: bool = True, over: Sequence[int] = ()) -> Begun:
        """The next token of the same rows, behind a step that may not be over. keeps: whether its logits are wanted;
        over: rows that are nobody's from now on, and begin anew so as to stay within their tables.
        """
        if keeps:
            begun.logits = begun.logits.clone()
        self._begin_anew(over)
        return self._begun(begun.kind, begun.latest + 1)

    def _begin_anew(self, over: Sequence[int]) -> None:
        """Rows that are nobody's from now on."""
        if over:
            self._inputs["position_ids"].index_fill_(0, on_device(over, self._device), 0)

    def _begun(self, kind: Kind, latest: int) -> Begun:
        logits, said = self._done(self._seen(latest), ("choice", kind, True))
        return Begun(to_host(said), logits, kind, latest)

    def chain(
        self, rows: Sequence[RowOptions], tokens: Sequence[int], positions: Sequence[int], count: int
    ) -> Iterator[Chosen]:
        """What `count` steps choose one after the other for `rows`.

        A step takes what the one before it has chosen without the host, and runs while the host reads it. `logits` are
        those of the yielded step, as long as the next one is not asked for.
        """
        begun = self.begin(rows, tokens, positions)
        for _ in range(count - 1):
            # the next step begins before the host knows whether it needs these
            following = self.again(begun, keeps=not self.rows.is_certain(begun.kind))
            yield Chosen(begun.wait(), begun.logits)
            begun = following
        yield Chosen(begun.wait(), begun.logits)

    def _kind_for(self, kind: Kind) -> Kind:
        """One for which steps are captured, and which serves `kind`."""
        if len(self._kinds) >= _MOST_KINDS and kind not in self._kinds:
            kind = functools.reduce(Kind.join, self._kinds, kind)
        if kind not in self._kinds:
            self._kinds.append(kind)
        return kind

    def _set(self, tokens: Sequence[int], positions: Sequence[int], active: Sequence[bool] = ()) -> None:
        self.cache.fixed_states.settle(self.cache.buffers)
        self._inputs["active"].copy_(torch.tensor(active or [True] * self.batch))
        both = on_device([tokens, positions], self._device)
        self._inputs["input_ids"].copy_(both[0, :, None])
        self._inputs["position_ids"].copy_(both[1, :, None])

    def _seen(self, latest: int) -> int:
        """How many slots a step looks at."""
        most = self.cache.max_length
        # one compiled graph only: compiling takes far longer than looking at empty slots
        if self._is_compiled or self.cache.any_length:
            return most
        return min(most, -(-(latest + 1) // _ROUND_TO) * _ROUND_TO)

    def _done(self, seen: int, step: FixedStep) -> Any:
        if not self._captures:
            return self._body(step)(seen)
        graph, result = self._graph(seen, step)
        graph.replay()
        return result

    def _graph(self, seen: int, step: FixedStep) -> tuple[Any, Any]:
        if (seen, step) not in self._graphs:
            self._graphs[seen, step] = self._capture(self._body(step), seen)
        return self._graphs[seen, step]

    def _body(self, step: FixedStep) -> Callable[[int], Any]:
        what, kind, chained = step
        if kind is not None:
            return functools.partial(self._chosen, kind=kind, chained=chained)
        assert what == "logits"
        return self._run

    @torch.no_grad()
    def _chosen(self, seen: int, kind: Kind, *, chained: bool) -> tuple[Tensor, Tensor]:
        """One step and its choice, or all ranks' choices; chained: its own as the input of the next."""
        logits = self._run(seen)
        said = self.rows.choose(logits, kind)
        if chained:
            self.rows.advance(said, kind, self._inputs["input_ids"], self._inputs["position_ids"])
        return logits, said if self._of_all is None else self._of_all(said[None])

    def _compare(self, seen: int) -> None:
        """One step as it is, with every collective compared; the next one does it again, and writes the same."""
        if self._compared:
            return
        self.cache.begin_fixed(self._inputs["position_ids"], seen, rows=self._rows, group=self.group)
        states = self.cache.fixed_states.copies()
        self._execute(self._given)
        self.cache.fixed_states.restore(states)
        self._execute.communicator.begin_run(new_shapes=False)
        self._compared = True

    def release(self) -> None:
        """Gives the captured steps back now: an error's traceback may keep this object for long."""
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    @torch.no_grad()
    def _run(self, seen: int) -> Any:
        self.cache.begin_fixed(self._inputs["position_ids"], seen, rows=self._rows, group=self.group)
        communicator = self._execute.communicator
        try:
            made = self._function(*self._given)
        except BaseException as error:
            reason = communicator.explained(error)
            communicator.abort(reason)
            raise reason from (None if reason is error else error)
        return made if isinstance(made, tuple) else made[:, 0]

    @torch.no_grad()
    def _capture(self, run: Callable[[int], Any], seen: int) -> tuple[Any, Any]:
        # a step that is run again on the same inputs and states writes what it has written: the warm-up is free of
        # effects
        asked = [] if self._row_sampler is None else self._row_sampler.changing
        before = [(given, given.clone()) for given in (*self._inputs.values(), self.inbox.said, *asked)]
        states = self.cache.fixed_states.copies()

        def warm_up() -> None:
            run(seen)
            for given, held in before:
                given.copy_(held)
            self.cache.fixed_states.restore(states)

        with nullcontext() if self._is_compiled else replayed():
            self._execute.communicator.begin_run(new_shapes=True)
            warm_up()
            self._execute.communicator.begin_run(new_shapes=False)
            if self._inputs["last"].is_cuda:
                side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UP):
                        warm_up()
                torch.cuda.current_stream().wait_stream(side)
            return captured(lambda: run(seen), self._pool)
