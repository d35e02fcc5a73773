"""Many requests at once on one rank: they come and go between steps, and each is told what it would be told alone.

    loop.add(7, request)       a request of one row; raises InputError where it cannot be served
    loop.step()                what came of one step: `Told` per sequence that has a new token, or is refused
    loop.cancel(7)             nobody wants it any more

    Scheduler       who runs in a step                          `scheduler.py`
    Steps           these tokens through the rank's programs    `runtime.generation.steps`
    Places          where their tokens lie in the cache         `places.py`
    RowChooser      the next token of each                      `choose_rows.py`
    StagedSteps     the same over pipeline stages               `stages/`
    OwnBatches      the same where ranks have their own         `own_batches.py`

All ranks of a replica are told the same in the same order, and so do the same: none has to ask another.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from partitioner.errors import InputError
from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.generation.batching.choose_rows import Asked, Choice, RowChooser
from runtime.generation.batching.chosen_steps import ChosenSteps, Device, OwnDevice, StepsAhead
from runtime.generation.batching.own_batches import DealtScheduler, OwnBatches
from runtime.generation.batching.places import InBlocks, Places, Run, places_for, why_eager
from runtime.generation.batching.scheduler import Scheduler
from runtime.generation.batching.stages.chosen_groups import ChosenGroups, GroupDevice
from runtime.generation.batching.stages.staged_steps import StagedSteps
from runtime.generation.batching.work import Counts, Work
from runtime.generation.generation_request import GenerationRequest
from runtime.generation.steps import Loaded, Steps
from runtime.kv_cache.cache_size import CacheSize, Room
from runtime.program.host_default import host_default
from runtime.sampling.grammar import Grammars

__all__ = ["BatchLoop", "Told"]

_log = logging.getLogger("partitioner")
_LONG_S = 2.0
_PROMPTS = 64, 1024  # tokens: kernels for fewer than a thousand, and for more, are not the same


@dataclass(frozen=True)
class Told:
    """A sequence's next token; is_over: it has ended with it. Or why it is refused, which ends it as well."""

    number: int
    token: int
    logprob: float | None
    is_over: bool
    error: Exception | None = None
    top: tuple[tuple[int, float], ...] | None = None


class _Runner(Protocol):
    def advance(self, run: Run | None) -> tuple[Work, dict[int, Choice]] | None:
        """Carries out `run`; what comes of a step, which may be an earlier one."""


class BatchLoop:
    """See the module's docstring. The cache is set aside by the first `add`, or by `reserve`."""

    def __init__(
        self,
        prefill: Loaded,
        decode: Loaded,
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
        *,
        size: CacheSize | None,
        rows: int | None,
        vocabulary: str | None,
        block_size: int | None = None,
        compile: bool,
        cuda_graph: bool,
    ) -> None:
        self._prefill_by, self._decode_by = prefill, decode
        self.program = prefill.program
        self._parts = self.program.mesh.size(*self.program.batch_axes) if self.program.batch_axes else 1
        """How many ranks have sequences of their own."""
        self._communicator, self._device, self._profiler = communicator, device, profiler
        self._wanted, self._rows, self._block_size = size, rows, block_size
        self._decoding = {"compile": compile, "cuda_graph": cuda_graph}
        self._chooser = RowChooser(self.program, communicator, device, profiler)
        self._grammars = None if vocabulary is None else Grammars(vocabulary)
        self.numbers = itertools.count()
        """For sequences that nobody has numbered."""
        self._asked: dict[int, Asked] = {}
        self._refused: list[Told] = []
        """Those for which a cache that was set aside later has no room."""
        self._counts = Counts()
        self._turn = 0
        self._places: Places | None = None
        """None until the cache is set aside."""
        self.in_steps: ChosenSteps | ChosenGroups | None = None

    @host_default
    def reserve(self, size: CacheSize) -> Room:
        """A collective: sets another cache aside. Sequences that are under way run their tokens again in it."""
        self._wanted = size
        self._release()
        self._set_aside()
        assert self._places is not None
        self._begin_all_sizes()
        for number, asked in self._asked.items():  # in the order in which they came
            try:
                self.scheduler.add(number, asked.text, most=asked.longest, piece=asked.settings.prefill_step)
            except InputError as error:
                self._refused.append(Told(number, -1, None, True, error))
        for each in self._refused:
            del self._asked[each.number]
        return self._places.room

    @host_default
    def add(self, number: int, request: GenerationRequest, *, given: Sequence[int] | None = None) -> None:
        """Every rank alike; the first is a collective. Raises InputError where it cannot be served.

        number: no other's before. given: as `Asked` has it.
        """
        if self._places is None:
            self._set_aside()
        if len(request.prompts) != 1:
            raise InputError(f"a sequence is one row, got a request of {len(request.prompts)}")
        request.require_fits(self.program, request.longest)
        asked = Asked(request, vocab_size=self.program.vocab_size, grammars=self._grammars, given=given)
        self.scheduler.add(number, asked.text, most=request.longest, piece=request.settings.prefill_step)
        self._asked[number] = asked

    def cancel(self, number: int) -> None:
        if self._asked.pop(number, None) is not None:
            self.scheduler.cancel(number)

    @host_default
    def step(self) -> list[Told]:
        """One step, over stages one slot of their ring; nothing where there is nothing to do. Every rank alike."""
        if self._places is None:
            return []
        refused, self._refused = self._refused, []
        found, has_run = self._advance(self._turn)
        if has_run:
            self._turn = (self._turn + 1) % self.scheduler.limits.groups
        return [*refused, *(told for done in found for told in self._learn(*done))]

    def _advance(self, turn: int) -> tuple[Sequence[tuple[Work, dict[int, Choice]]], bool]:
        """What has come of steps: of each rank's sequences where ranks have their own; and whether the turn is over."""
        if isinstance(self.in_steps, ChosenGroups):
            return self.in_steps.advance(turn, lambda: self._next_run(turn), self.chooses_in_step)
        return self._advance_one(turn, self.in_steps), True

    def _next_run(self, turn: int) -> Run | None:
        scheduler = self.scheduler
        works = scheduler.next_of_all(turn) if isinstance(scheduler, DealtScheduler) else [scheduler.next(turn)]
        return self._run_of(works) if any(works) else None

    def _advance_one(self, turn: int, steps: ChosenSteps | None) -> Sequence[tuple[Work, dict[int, Choice]]]:
        under_way = None if steps is None else steps.under_way
        run = under_way or self._next_run(turn)
        if steps is not None and run is not None:
            goes_on = self.chooses_in_step(run)
            if goes_on or under_way is not None:
                return steps.advance(run, goes_on=goes_on)
        if isinstance(self.scheduler, DealtScheduler):
            return self._own.advance(run)
        done = self._runner.advance(run)
        return () if done is None else (done,)

    def status(self) -> dict[str, Any]:
        """As `runtime.launching.status.ReplicaStatus` has it."""
        if (places := self._places) is None:
            return {}
        return {
            "running": self.scheduler.running,
            "waiting": self.scheduler.waiting,
            "tokens_cached": 0 if places.tokens is None else self.scheduler.tokens_cached,
            "tokens_that_fit": None if places.tokens is None else self._parts * places.tokens,
            "longest_that_fits": None if places.tokens is None else places.limits.room + 1,
            **vars(self.scheduler.counts),
            "prefixes_kept": not places.why_not_kept,
            "why_not_kept": places.why_not_kept,
            "why_not_packed": places.why_not_packed,
            "why_eager": self._why_eager,
            "why_chosen_behind": "" if self.in_steps is None else self.in_steps.why_behind,
        }

    def release(self) -> None:
        """Gives the cache back; what is under way cannot go on."""
        self._release()
        self._asked.clear()

    def _learn(self, work: Work, choices: dict[int, Choice]) -> list[Told]:
        told = []
        for number, choice in choices.items():
            if (asked := self._asked.get(number)) is None:
                continue  # nobody wants it any more
            is_over = choice.error is not None or asked.learn(choice.token)
            told.append(Told(number, choice.token, choice.logprob, is_over, choice.error, choice.top))
        self.scheduler.learn(
            work,
            {each.number: each.token for each in told if each.error is None},
            {each.number for each in told if each.is_over and each.error is None},
        )
        for each in told:
            if each.error is not None and self._places is not None:
                # what it computed may be no numbers, which must not reach others
                is_own = not isinstance(self.scheduler, DealtScheduler) or self._is_own(each.number)
                blocks = self.scheduler.cancel(each.number, keep=False)
                self._places.clear(blocks if is_own else [])
            if each.is_over:
                del self._asked[each.number]
        return told

    def _set_aside(self) -> None:
        program, size, rows = self.program, self._wanted, self._rows
        if self._parts > 1:  # each rank's share
            size = None if size is None else replace(size, max_batch=-(-size.max_batch // self._parts))
            rows = None if rows is None else -(-rows // self._parts)
        self._places = places = places_for(
            program, size, self._communicator, self._device, rows=rows, block_size=self._block_size
        )
        self._steps = Steps(
            self._prefill_by,
            self._decode_by,
            places.cache,
            self._communicator,
            self._device,
            self._profiler,
            **self._decoding,
        )
        self._why_eager = why_eager(places, program, **self._decoding)
        if self._why_eager and program.rank == 0:
            _log.warning("decode steps run node by node, in spite of %s", self._why_eager)
        stages = 1 if program.stage is None else program.stage.count
        limits = replace(places.limits, groups=stages, one_prompt_below=self._steps.packs_below)
        self.scheduler: Scheduler | DealtScheduler = (
            DealtScheduler(limits, self._parts, self._counts) if self._parts > 1 else Scheduler(limits, self._counts)
        )
        self._turn = 0
        self._runner: _Runner = _OneStage(self)
        self._staged: StagedSteps | None = None
        if program.stage is not None:
            assert self._decode_by.program.stage is not None
            self._runner = self._staged = StagedSteps(
                program.stage,
                self._decode_by.program.stage,
                self._communicator,
                self._device,
                self._profiler,
                run=self.run,
                choose=self.choose,
                sampled=self.sampled,
                named=self._named,
                sizes=lambda run: self._steps.sizes(run.piece, least=run.least),
                head=self.head if self._steps.shares_head else None,
            )
        if isinstance(self.scheduler, Scheduler):
            schedulers, own, tell = [self.scheduler], 0, None
        else:
            schedulers, own = self.scheduler.each, program.coordinates[program.batch_axes[0]]
            self._own = OwnBatches(
                program,
                self._decode_by.program,
                self._communicator,
                self._device,
                self._profiler,
                places,
                run=self._runner.advance,
                last=schedulers[own].last_of,
                sampled=self.sampled,
                named=self._named,
            )
            tell = self._own.tell
        if isinstance(places, InBlocks):
            places.prepare(groups=stages if self._parts == 1 else 1, few_sizes=self._decoding["compile"])
        staged = self._staged
        if isinstance(places, InBlocks) and (staged is None or self._parts == 1):
            of_device = OwnDevice if staged is None else GroupDevice
            self._of_device: Device = of_device(places, self._steps)
            if staged is not None and not self._steps.shares_head:
                tell = staged.tell_one
            ahead = StepsAhead(self._of_device, places, schedulers, self._chooser, self._asked, own=own, tell=tell)
            self.in_steps = ChosenSteps(ahead) if staged is None else ChosenGroups(ahead, staged)

    def _run_of(self, works: Sequence[Work | None]) -> Run:
        """What this rank runs of a step; works: of each rank that has sequences of its own, or of the one there is."""
        if isinstance(self.scheduler, DealtScheduler):
            return self._own.run_of(works)
        (work,) = works
        assert self._places is not None
        assert work is not None
        return self._places.run_of(work, self.scheduler.last_of)

    def run(self, run: Run, received: Any = ()) -> Any:
        """The rank's programs on the tokens of a step: logits [n, 1, V/r], or what its stage hands on."""
        assert self._places is not None
        self._places.before(run)
        if run.work.decode and self._from_fixed_memory:
            assert isinstance(self._places, InBlocks)
            return self._places.decode(self._steps, run, received)
        return self._steps.execute(
            run.piece, received, decode=run.work.decode, rows=run.rows, least=run.least, like=run.like
        )

    def _begin_all_sizes(self) -> None:
        """Captures steps of all numbers of rows, and has kernels compiled that others need: once, and not amid requests
        that come and go.
        """
        places, captured = self._places, self._decoding["cuda_graph"] and self._from_fixed_memory
        if not (captured and self.in_steps is not None and isinstance(places, InBlocks)):
            return
        sizes = places.sizes
        with torch.no_grad():
            for size in reversed(sizes):  # the largest first: what others need of memory they find there
                began = time.perf_counter()
                if places.limits.packs and size in (sizes[0], sizes[-1]):
                    self._begin_prompts(places, size)
                self._of_device.begin_size(size)
                took = time.perf_counter() - began
                if took > _LONG_S and self.program.rank == 0:
                    _log.warning("kernels of steps of %d rows were compiled and captured in %.1f s", size, took)

    def _begin_prompts(self, places: InBlocks, rows: int) -> None:
        """Captures prompts of nobody amid so many rows."""
        most = min(places.cache.step, places.cache.max_length)
        for tokens in sorted({min(tokens, most) for tokens in _PROMPTS}):
            run = places.of_nobody(rows, tokens)
            for _ in range(2):  # the second is captured
                self.run(run, () if self._staged is None else self._staged.nothing_handed_on(run))

    def _named(self, number: int) -> int | None:
        """How many of the most probable tokens a sequence is told as well, if any."""
        return self._asked[number].settings.top_logprobs

    def _is_own(self, number: int) -> bool:
        """Whether this rank has the sequence in its cache."""
        assert isinstance(self.scheduler, DealtScheduler)
        (axis,) = self.program.batch_axes
        return self.scheduler.rank_of(number) == self.program.coordinates[axis]

    def head(self, run: Run, made: Any) -> Any:
        """Logits [n, 1, V/r] of a head that all stages share out; made: what the last stage yields."""
        return self._steps.head(run.piece, made, decode=run.work.decode)

    @property
    def _from_fixed_memory(self) -> bool:
        """Whether decode steps are compiled or captured."""
        return any(self._decoding.values()) and not self._why_eager

    def chooses_in_step(self, run: Run) -> bool:
        """Whether a captured step chooses its rows' tokens too, where they ask for nothing that only the host does."""
        captured = self._decoding["cuda_graph"] and self._from_fixed_memory
        return captured and run.work.decode and self._profiler.recording is None

    def sampled(self, work: Work) -> list[int]:
        """The sequences of a step that are to be told a token: they have none left to run, and are still wanted."""
        return [turn.number for turn in work.turns if turn.samples and turn.number in self._asked]

    def choose(self, run: Run, logits: Any) -> dict[int, Choice]:
        """Their tokens, from logits [n, 1, V/r]."""
        numbers = self.sampled(run.work)
        if not numbers:
            return {}
        # in the order of their rows, so that these are taken as they lie
        places = {turn.number: at for at, turn in zip(run.at, run.work.turns, strict=True)}
        in_order = sorted(numbers, key=places.__getitem__)
        rows = [places[number] for number in in_order]
        found = logits[:, 0] if rows == list(range(len(logits))) else logits[rows, 0]
        choices = self._chooser.choose(found, [self._asked[number] for number in in_order])
        by_number = dict(zip(in_order, choices, strict=True))
        return {number: by_number[number] for number in numbers}

    def _release(self) -> None:
        if self._places is not None:
            self._steps.release()
            self._places = self.in_steps = None


class _OneStage:
    """A step runs, and its tokens are chosen behind it."""

    def __init__(self, loop: BatchLoop) -> None:
        self._loop = loop

    def advance(self, run: Run | None) -> tuple[Work, dict[int, Choice]] | None:
        if run is None:
            return None
        return run.work, self._loop.choose(run, self._loop.run(run))
