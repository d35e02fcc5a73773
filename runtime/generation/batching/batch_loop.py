"""Many requests at once on one rank: they come and go between steps, and each is told what it would be told alone.

    loop.add(7, request)       a request of one row; raises InputError where it cannot be served
    loop.step()                what came of one step: `Told` per sequence that has a new token, or is refused
    loop.cancel(7)             nobody wants it any more

    Scheduler       who runs in a step                          `scheduler.py`
    Steps           these tokens through the rank's programs    `runtime.generation.steps`
    RowChooser      the next token of each                      `choose_rows.py`
    StagedSteps     the same over pipeline stages               `staged_steps.py`

All ranks of a replica are told the same in the same order, and so do the same: none has to ask another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from partitioner.errors import InputError
from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.generation.batching.choose_rows import Asked, Choice, RowChooser
from runtime.generation.batching.scheduler import Counts, Limits, Scheduler, Work
from runtime.generation.batching.staged_steps import StagedSteps
from runtime.generation.conversation import Piece
from runtime.generation.generation_request import GenerationRequest
from runtime.generation.steps import Loaded, Steps
from runtime.kv_cache.batch import PagedRows
from runtime.kv_cache.cache_size import CacheSize, Room, default_step
from runtime.kv_cache.paged_size import PagedSize
from runtime.program.rank_program import RankProgram

__all__ = ["BatchLoop", "Told"]


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
    def advance(self, work: Work | None) -> tuple[Work, dict[int, Choice]] | None:
        """Runs `work`; what comes out of a step, which may be that of an earlier one."""
        ...


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
        size: CacheSize | None = None,
        rows: int | None = None,
        block_size: int | None = None,
    ) -> None:
        self._prefill_by, self._decode_by = prefill, decode
        self.program = prefill.program
        self._communicator, self._device, self._profiler = communicator, device, profiler
        self._wanted, self._rows, self._block_size = size, rows, block_size
        self._chooser = RowChooser(self.program, communicator, device, profiler)
        self._asked: dict[int, Asked] = {}
        self._refused: list[Told] = []
        """Those for which a cache that was set aside later has no room."""
        self._counts = Counts()
        self._turn = 0
        self.size: PagedSize | None = None
        self.why_not_kept = why_not_kept(self.program)

    def reserve(self, size: CacheSize) -> Room:
        """A collective: sets another cache aside. Sequences that are under way run their tokens again in it."""
        self._wanted = size
        self._release()
        self._set_aside()
        assert self.size is not None
        for number, asked in self._asked.items():  # in the order in which they came
            try:
                self.scheduler.add(number, asked.text, most=asked.longest, piece=asked.settings.prefill_step)
            except InputError as error:
                self._refused.append(Told(number, -1, None, True, error))
        for each in self._refused:
            del self._asked[each.number]
        return self.size.room

    def add(self, number: int, request: GenerationRequest) -> None:
        """Every rank alike; the first is a collective. Raises InputError where it cannot be served."""
        if self.size is None:
            self._set_aside()
        if len(request.prompts) != 1:
            raise InputError(f"a sequence is one row, got a request of {len(request.prompts)}")
        if request.settings.top_logprobs is not None and self.program.stage is not None:
            raise InputError("top_logprobs is not offered over pipeline stages: leave it out, or leave --pp out")
        request.require_fits(self.program, request.longest)
        asked = Asked(request, vocab_size=self.program.vocab_size)
        self.scheduler.add(number, asked.text, most=request.longest, piece=request.settings.prefill_step)
        self._asked[number] = asked

    def cancel(self, number: int) -> None:
        if self._asked.pop(number, None) is not None:
            self.scheduler.cancel(number)

    def step(self) -> list[Told]:
        """One step, over stages one slot of their ring; nothing where there is nothing to do. Every rank alike."""
        if self.size is None:
            return []
        refused, self._refused = self._refused, []
        work = self.scheduler.next(self._turn)
        self._turn = (self._turn + 1) % self.scheduler.limits.groups
        done = self._runner.advance(work)
        return refused if done is None else refused + self._learn(*done)

    def status(self) -> dict[str, Any]:
        """As `runtime.launching.status.ReplicaStatus` has it."""
        kept = {"prefixes_kept": not self.why_not_kept, "why_not_kept": self.why_not_kept}
        if self.size is None:
            return kept
        return {
            "running": self.scheduler.running,
            "waiting": self.scheduler.waiting,
            "tokens_cached": 0 if self.size.unlimited else self.scheduler.tokens_cached,
            "tokens_that_fit": self.size.tokens,
            **vars(self.scheduler.counts),
            **kept,
        }

    def release(self) -> None:
        """Gives the cache back; what is under way cannot go on."""
        self._release()
        self._asked.clear()

    def _learn(self, work: Work, choices: dict[int, Choice]) -> list[Told]:
        told = []
        for number, choice in choices.items():
            asked = self._asked.get(number)
            if asked is None:
                continue  # nobody wants it any more
            is_over = choice.error is not None or asked.learn(choice.token)
            told.append(Told(number, choice.token, choice.logprob, is_over, choice.error, choice.top))
        self.scheduler.learn(
            work,
            {each.number: each.token for each in told if each.error is None},
            {each.number for each in told if each.is_over and each.error is None},
        )
        for each in told:
            if each.error is not None:
                # what it computed may be no numbers, which must not reach others
                self.steps.cache.clear(self.scheduler.cancel(each.number, keep=False))  # type: ignore[attr-defined]
            if each.is_over:
                del self._asked[each.number]
        return told

    def _set_aside(self) -> None:
        program, wanted = self.program, self._wanted
        rows = self._rows or (None if wanted is None else wanted.max_batch)
        step = None if wanted is None else wanted.prefill_step
        if step is None:
            step = default_step(program, self._communicator, self._device, max_batch=1)
        self.size = size = PagedSize.agreed(
            program, wanted, self._communicator, self._device, step=step, rows=rows, block_size=self._block_size
        )
        self.steps = Steps(
            self._prefill_by,
            self._decode_by,
            size.make(program.states, self._device),
            self._communicator,
            self._device,
            self._profiler,
        )
        stages = 1 if program.stage is None else program.stage.count
        self.scheduler = Scheduler(
            Limits(
                rows=size.rows,
                blocks=size.blocks,
                block_size=size.block_size,
                budget=size.step,
                piece=program.limits.get("sequence", (1, None))[1],
                keeps_prefixes=not self.why_not_kept,
                groups=stages,
            ),
            self._counts,
        )
        self._turn = 0
        self._runner: _Runner = _OneStage(self)
        if program.stage is not None:
            self._runner = StagedSteps(
                program.stage,
                self._communicator,
                self._device,
                self._profiler,
                run=self.run,
                choose=self.choose,
                sampled=self.sampled,
                sizes=lambda work: self.steps.sizes(_piece(work)),
            )

    def run(self, work: Work, received: Any = ()) -> Any:
        """The rank's programs on the tokens of a step: logits [n, 1, V/r], or what its stage hands on."""
        piece = _piece(work)
        rows = PagedRows(tuple(turn.row for turn in work.turns), tuple(turn.table for turn in work.turns))
        return self.steps.execute(piece, received, decode=work.decode, rows=rows)

    def sampled(self, work: Work) -> list[int]:
        """The sequences of a step that are to be told a token: they have none left to run, and are still wanted."""
        return [turn.number for turn in work.turns if turn.samples and turn.number in self._asked]

    def choose(self, work: Work, logits: Any) -> dict[int, Choice]:
        """Their tokens, from logits [n, 1, V/r]."""
        numbers = self.sampled(work)
        if not numbers:
            return {}
        asked = [self._asked[number] for number in numbers]
        rows = [at for at, turn in enumerate(work.turns) if turn.number in numbers]
        found = logits[:, 0] if len(rows) == len(work.turns) else logits[rows, 0]
        return dict(zip(numbers, self._chooser.choose(found, asked), strict=True))

    def _release(self) -> None:
        if self.size is not None:
            self.steps.release()
            self.size = None


class _OneStage:
    """A step runs and is chosen from at once."""

    def __init__(self, loop: BatchLoop) -> None:
        self._loop = loop

    def advance(self, work: Work | None) -> tuple[Work, dict[int, Choice]] | None:
        return None if work is None else (work, self._loop.choose(work, self._loop.run(work)))


def _piece(work: Work) -> Piece:
    turns = work.turns
    return Piece([list(turn.tokens) for turn in turns], [turn.start for turn in turns], (True,) * len(turns))


def why_not_kept(program: RankProgram) -> str:
    """Why equal prefixes are not kept once; "": they are."""
    of_sequences = [state.name for state in program.states if not state.per_token]
    if of_sequences:
        return (
            f"{of_sequences[0]!r} is a state per sequence, which holds all its tokens so far: that of a prefix is gone "
            "when the next token has been run"
        )
    return ""
