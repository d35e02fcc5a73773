"""Steps of single tokens that choose the next ones themselves: one begins before the host has read the one before it.

    steps.under_way              the step that has begun already; None: none has
    steps.advance(run)           what a step has chosen, its host's part while the next one runs

A step takes its tokens where the one before it has left them, so the device need not wait for the host to read these,
to tell them, and to see who goes on: all rows are taken to go on. What comes of a row that has ended is not told; what
it has written lies in blocks that were its own. A row whose token the host chooses itself is run again. So no row is
told anything else than without. It is done where the scheduler would run the same sequences next whatever is chosen, or
fewer: nobody comes, and there are blocks for all. Rows of those that are over go on for nobody, where nobody reads.

Ranks with sequences of their own gather in the step what each has chosen, so that none waits for another's host: every
rank reads the tokens of all a step late, and takes the same decisions by them. Only what hosts choose is told by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from runtime.generation.batching.choose_rows import Asked, Choice, RowChooser
from runtime.generation.batching.places import InBlocks, Run
from runtime.generation.batching.scheduler import Scheduler
from runtime.generation.batching.work import Turn, Work
from runtime.generation.decode_graphs import Begun, Decoder
from runtime.generation.steps import Steps
from runtime.sampling.row_sampler import RowOptions

__all__ = ["ChosenSteps", "next_behind"]

Choices = dict[int, Choice]
"""By the number of a sequence."""
_Place = tuple[int, int]
"""A row of a step, and the number of its sequence."""
_NOTHING = RowOptions()


@dataclass
class _UnderWay:
    """A step that has begun. at: of each rank's turns, which row of it each is, which stays from a step to the next.

    void: sequences of which it counts for nothing.
    """

    run: Run
    """Of one that has begun behind another, what ranks run, and not how."""
    decoder: Decoder
    begun: Begun
    at: Sequence[Sequence[int]]
    on_host: bool
    """Whether a row asks for what only the host does."""
    void: set[int] = field(default_factory=set)


class ChosenSteps:
    """See the module's docstring.

    schedulers: this rank's, or those of all ranks that have sequences of their own, of which `own` is this rank's.
    tell: what is chosen for the named sequences of each rank, from this rank's choices; None where it has all
    sequences. few_sizes: as `InBlocks` has it.
    """

    def __init__(
        self,
        places: InBlocks,
        steps: Steps,
        schedulers: Sequence[Scheduler],
        chooser: RowChooser,
        asked: Mapping[int, Asked],
        *,
        own: int,
        tell: Callable[[Sequence[Sequence[int]], Choices], list[Choices]] | None,
        few_sizes: bool,
    ) -> None:
        self._places, self._steps, self._schedulers, self._chooser = places, steps, schedulers, chooser
        self._asked, self._own, self._tell = asked, own, tell
        self._few_sizes, self._sizes = few_sizes, places.sizes(few_sizes=few_sizes)
        self._latest: _UnderWay | None = None
        self.why_behind = ""
        """The option for which the host chose tokens behind a step, the last such."""

    @property
    def under_way(self) -> Run | None:
        if self._latest is not None and not any(turn.number in self._asked for turn in self._latest.run.turns()):
            self._latest = None  # nobody wants any of it
        return None if self._latest is None else self._latest.run

    def advance(self, run: Run, *, goes_on: bool = True) -> list[tuple[Work, Choices]]:
        """What has come of each rank's sequences. run: `under_way`, if there is one. goes_on: whether the next step may
        be one of these.
        """
        latest, self._latest = self._latest or self._begin(run), None
        if goes_on:
            self._latest = self._begin_next(latest)
        return self._read(latest)

    def _begin(self, run: Run) -> _UnderWay:
        asked = self._of_rows(run)
        others = [self._asked.get(turn.number) for turn in run.turns()] if run.others else []
        reasons = [each.on_host for each in (others or asked) if each is not None]
        self.why_behind = next(filter(None, reasons), self.why_behind)
        rows, also = (
            [_NOTHING if each is None or each.on_host else each.row_options() for each in some]
            for some in (asked, others)
        )
        self._places.before(run)
        decoder, begun = self._places.begin(self._steps, run, rows, few_sizes=self._few_sizes, also=also)
        at = [() if work is None else self._places.rows_at(work) for work in run.works]
        return _UnderWay(run, decoder, begun, at, any(reasons))

    def _begin_next(self, latest: _UnderWay) -> _UnderWay | None:
        if latest.on_host or latest.void:
            return None
        smaller = [size for size in self._sizes if size < latest.decoder.batch]
        # where so few are left that a smaller step has room for them, that begins
        works = next_behind(self._schedulers, latest.run.works, more_than=max(smaller, default=0))
        if works is None:
            return None
        places: list[Sequence[int]] = []
        for before, at, work in zip(latest.run.works, latest.at, works, strict=True):
            left = () if work is None else work.turns
            if before is None or len(left) == len(before.turns):
                places.append(at)
            else:
                on = {turn.number for turn in left}
                places.append([row for row, turn in zip(at, before.turns, strict=True) if turn.number in on])
        mine, own = works[self._own] or Work((), decode=True, group=self._own), places[self._own]
        over = [row for row in latest.at[self._own] if row not in own] if len(own) < len(latest.at[self._own]) else []
        begun = self._places.again(latest.decoder, latest.begun, mine.turns, own, over=over)
        run = replace(latest.run, work=mine, others=tuple(works) if latest.run.others else ())
        return _UnderWay(run, latest.decoder, begun, places, on_host=False)

    def _read(self, latest: _UnderWay) -> list[tuple[Work, Choices]]:
        said = latest.begun.wait()
        everyone = said.view(-1, *said.shape[-2:])
        found: list[Choices] = []
        behind: list[list[tuple[int, int]]] = []
        said_of = zip(latest.run.works, latest.at, everyone.transpose(1, 2).tolist(), strict=True)
        for work, at, rows in said_of:
            known, unknown = self._told(() if work is None else work.turns, at, rows, latest.void)
            found.append(known)
            behind.append(unknown)
        if any(behind):
            numbers = [[number for _, number in each] for each in behind]
            for known, chosen in zip(found, self._chosen_behind(latest, behind[self._own], numbers), strict=True):
                known |= chosen
            if self._latest is not None:  # it has begun with another token, or with none
                self._latest.void.update(number for each in numbers for number in each)
        return [
            (_without(work, latest.void), _in_order(work, each) if unknown else each)
            for work, each, unknown in zip(latest.run.works, found, behind, strict=True)
            if work is not None
        ]

    def _told(
        self, turns: Sequence[Turn], at: Sequence[int], rows: Sequence[Sequence[float]], void: set[int]
    ) -> tuple[Choices, list[_Place]]:
        """What a step has said of a rank's sequences; and which it has not chosen for, behind their rows."""
        known: Choices = {}
        unknown: list[_Place] = []
        for row, turn in zip(at, turns, strict=True):
            each = self._asked.get(turn.number)
            if each is None or not turn.samples or turn.number in void:
                continue
            token, best, is_certain, logprob = rows[row]
            if each.on_host or not is_certain or not math.isfinite(best):
                unknown.append((row, turn.number))
            else:
                known[turn.number] = Choice(int(token), logprob if each.settings.logprobs else None)
        return known, unknown

    def _chosen_behind(
        self, latest: _UnderWay, own: Sequence[_Place], numbers: Sequence[Sequence[int]]
    ) -> Sequence[Choices]:
        """own: this rank's rows for which the step has not chosen; numbers: such sequences of each rank."""
        chosen: Choices = {}
        if own:
            asked = [self._asked[number] for _, number in own]
            choices = self._chooser.choose(latest.begun.logits[[at for at, _ in own]], asked)
            chosen = {number: choice for (_, number), choice in zip(own, choices, strict=True)}
        return [chosen] if self._tell is None else self._tell(numbers, chosen)

    def _of_rows(self, run: Run) -> list[Asked | None]:
        """Who asks, in the order of the rows."""
        turns = [turn for _, turn in sorted(zip(run.at, run.work.turns, strict=True), key=lambda each: each[0])]
        return [self._asked.get(turn.number) for turn in turns]


def _without(work: Work, void: set[int]) -> Work:
    return replace(work, turns=tuple(turn for turn in work.turns if turn.number not in void)) if void else work


def _in_order(work: Work, found: Choices) -> Choices:
    return {turn.number: found[turn.number] for turn in work.turns if turn.number in found}


def next_behind(
    schedulers: Sequence[Scheduler], works: Sequence[Work | None], *, more_than: int = 0
) -> list[Work | None] | None:
    """What runs behind single tokens that may not be over, whatever they yield; None where that is not certain.

    By scheduler: of the same sequences, but those that are over, or are with their next token. Nobody knows its tokens
    yet: each is -1. more_than: how many of them one scheduler has to have more than.
    """
    going: list[list[Turn]] = []
    for scheduler, work in zip(schedulers, works, strict=True):
        turns = _going(scheduler, work)
        if turns is None:
            return None
        going.append(turns)
    if max(map(len, going)) <= more_than:
        return None
    return [
        _behind(scheduler, work, turns) if work is not None and turns else None
        for scheduler, work, turns in zip(schedulers, works, going, strict=True)
    ]


def _going(scheduler: Scheduler, work: Work | None) -> list[Turn] | None:
    """Those of the turns whose sequences run next, and no others do; None where that is not certain."""
    running, waiting = scheduler._running, bool(scheduler._waiting)
    if work is None:
        return None if running or waiting else []
    if not work.decode or scheduler.limits.groups > 1 or (waiting and None in scheduler._rows):
        return None
    going, needed, ending = [], 0, 0
    for turn in work.turns:
        each = running.get(turn.number)
        if each is None:
            continue
        end = turn.start + 2
        if each.admission != turn.admission or not turn.samples:
            return None
        if end > each.most:
            ending += 1
            continue
        going.append(turn)
        needed += scheduler._blocks_of(end) - len(each.blocks)
    comes = waiting and ending
    if comes or len(going) + ending < len(running) or needed > scheduler.pool.free:
        return None
    return going


def _behind(scheduler: Scheduler, work: Work, going: Sequence[Turn]) -> Work:
    turns = []
    for turn in going:
        each = scheduler._running[turn.number]
        while scheduler._blocks_of(turn.start + 2) > len(each.blocks):
            block = scheduler.pool.take()
            assert block is not None
            each.blocks.append(block)
        turns.append(
            Turn(turn.number, turn.row, turn.start + 1, (-1,), samples=True, table=tuple(each.blocks),
                 admission=turn.admission)
        )  # fmt: skip
    scheduler.counts.decode_tokens += len(turns)
    return replace(work, turns=tuple(turns))
