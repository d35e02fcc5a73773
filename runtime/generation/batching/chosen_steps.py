"""Steps of single tokens that choose the next ones themselves: one begins before the host has read the one before it.

    steps.under_way              the step that has begun already; None: none has
    steps.advance(run)           what a step has chosen, its host's part while the next one runs

A step takes its tokens where the one before it has left them, so the device need not wait for the host to read these,
to tell them, and to see who goes on: all rows are taken to go on. What comes of a row that has ended is not told; what
it has written lies in blocks that were its own. A row whose token the host chooses itself is run again. So no row is
told anything else than without. It is done where the scheduler would run the same rows next whatever is chosen: nobody
comes, none ends by its length, and there are blocks for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from runtime.generation.batching.choose_rows import Asked, Choice, RowChooser
from runtime.generation.batching.places import InBlocks, Run
from runtime.generation.batching.scheduler import Scheduler
from runtime.generation.batching.work import Work
from runtime.generation.decode_graphs import Begun, Decoder
from runtime.generation.steps import Steps
from runtime.sampling.row_sampler import RowOptions

__all__ = ["ChosenSteps", "next_behind"]

_NOTHING = RowOptions()


@dataclass
class _UnderWay:
    """A step that has begun. void: sequences of which it counts for nothing."""

    run: Run
    decoder: Decoder
    begun: Begun
    on_host: bool
    """Whether a row asks for what only the host does."""
    void: set[int] = field(default_factory=set)


class ChosenSteps:
    """See the module's docstring. scheduler: None where each rank has its own. few_sizes: as `InBlocks` has it."""

    def __init__(
        self,
        places: InBlocks,
        steps: Steps,
        scheduler: Scheduler | None,
        chooser: RowChooser,
        asked: Mapping[int, Asked],
        *,
        few_sizes: bool,
    ) -> None:
        self._places, self._steps, self._scheduler, self._chooser = places, steps, scheduler, chooser
        self._asked, self._few_sizes = asked, few_sizes
        self._latest: _UnderWay | None = None
        self.why_behind = ""
        """The option for which the host chose tokens behind a step, the last such."""

    @property
    def under_way(self) -> Run | None:
        if self._latest is not None and not any(turn.number in self._asked for turn in self._latest.run.work.turns):
            self._latest = None  # nobody wants any of it
        return None if self._latest is None else self._latest.run

    def advance(self, run: Run) -> tuple[Work, dict[int, Choice]]:
        """run: `under_way`, if there is one."""
        latest, self._latest = self._latest or self._begin(run), None
        self._latest = self._begin_next(latest)
        return self._read(latest)

    def _begin(self, run: Run) -> _UnderWay:
        asked = self._of_rows(run)
        theirs = [self._asked.get(turn.number) for work in run.others for turn in work.turns]
        reasons = [each.on_host for each in (theirs if run.others else asked) if each is not None]
        self.why_behind = next(filter(None, reasons), self.why_behind)
        rows, also = (
            [_NOTHING if each is None or each.on_host else each.row_options() for each in some]
            for some in (asked, theirs)
        )
        self._places.before(run)
        decoder, begun = self._places.begin(self._steps, run, rows, few_sizes=self._few_sizes, also=also)
        return _UnderWay(run, decoder, begun, any(reasons))

    def _begin_next(self, latest: _UnderWay) -> _UnderWay | None:
        if self._scheduler is None or latest.on_host or latest.void:
            return None
        work = next_behind(self._scheduler, latest.run.work)
        if work is None:
            return None
        run = self._places.run_of(work, self._scheduler.last_of)
        assert run.at == latest.run.at, "rows keep their places from a step to the next"
        begun = self._places.again(latest.decoder, latest.begun, run)
        return _UnderWay(run, latest.decoder, begun, on_host=False)

    def _read(self, latest: _UnderWay) -> tuple[Work, dict[int, Choice]]:
        work = latest.run.work
        found: dict[int, Choice] = {}
        behind: list[tuple[int, int, Asked]] = []
        said = latest.begun.wait().T.tolist()
        for at, turn in zip(latest.run.at, work.turns, strict=True):
            each = self._asked.get(turn.number)
            if each is None or not turn.samples or turn.number in latest.void:
                continue
            token, best, is_certain, logprob = said[at]
            if each.on_host or not is_certain or not math.isfinite(best):
                behind.append((at, turn.number, each))
            else:
                found[turn.number] = Choice(int(token), logprob if each.settings.logprobs else None)
        if behind:
            rows = [at for at, _, _ in behind]
            choices = self._chooser.choose(latest.begun.logits[rows], [each for _, _, each in behind])
            found |= {number: choice for (_, number, _), choice in zip(behind, choices, strict=True)}
            if self._latest is not None:  # it has begun with another token, or with none
                self._latest.void.update(number for _, number, _ in behind)
            found = {turn.number: found[turn.number] for turn in work.turns if turn.number in found}
        if latest.void:
            work = replace(work, turns=tuple(turn for turn in work.turns if turn.number not in latest.void))
        return work, found

    def _of_rows(self, run: Run) -> list[Asked | None]:
        """Who asks, in the order of the rows."""
        turns = [turn for _, turn in sorted(zip(run.at, run.work.turns, strict=True), key=lambda each: each[0])]
        return [self._asked.get(turn.number) for turn in turns]


def next_behind(scheduler: Scheduler, work: Work) -> Work | None:
    """What runs behind single tokens that may not be over, whatever they yield; None where that is not certain.

    Nobody knows its tokens yet: each is -1.
    """
    running = scheduler._running
    comes = bool(scheduler._waiting) and None in scheduler._rows
    if comes or not work.decode or scheduler.limits.groups > 1 or len(running) != len(work.turns):
        return None
    needed = 0
    for turn in work.turns:
        each = running.get(turn.number)
        end = turn.start + 2
        if each is None or each.admission != turn.admission or not turn.samples or end > each.most:
            return None
        needed += scheduler._blocks_of(end) - len(each.blocks)
    if needed > scheduler.pool.free:
        return None
    turns = []
    for turn in work.turns:
        each = running[turn.number]
        while scheduler._blocks_of(turn.start + 2) > len(each.blocks):
            block = scheduler.pool.take()
            assert block is not None
            each.blocks.append(block)
        turns.append(turn._replace(start=turn.start + 1, tokens=(-1,), table=tuple(each.blocks), keys=()))
    scheduler.counts.decode_tokens += len(turns)
    return replace(work, turns=tuple(turns))
