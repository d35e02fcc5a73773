"""Steps of single tokens that choose the next ones themselves: one begins before the host has read the one before it.

    steps.under_way              the step that has begun already; None: none has
    steps.advance(run)           what a step has chosen, its host's part while the next one runs
    StepsAhead                   both, step by step; over stages, `stages.chosen_groups` goes by it as well

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
from typing import Protocol

from torch import Tensor

from runtime.generation.batching.choose_rows import Asked, Choice, RowChooser
from runtime.generation.batching.places import InBlocks, Run
from runtime.generation.batching.scheduler import Scheduler
from runtime.generation.batching.work import Turn, Work
from runtime.generation.decode_graphs.decoder import Begun as BegunStep
from runtime.generation.decode_graphs.decoder import Decoder
from runtime.generation.steps import Steps
from runtime.sampling.row_sampler import RowOptions

__all__ = ["Begun", "Choices", "ChosenSteps", "Device", "OwnDevice", "StepsAhead", "UnderWay", "next_behind"]

Choices = dict[int, Choice]
"""By the number of a sequence."""
_Place = tuple[int, int]
"""A row of a step, and the number of its sequence."""
_NOTHING = RowOptions()


class Begun(Protocol):
    """A step that chooses, on its way. wait: for what `RowSampler.choose` has said, on the host.

    logits: [B, V/n], on the device, once it has been waited for; None on ranks that have none.
    """

    @property
    def wait(self) -> Callable[[], Tensor]: ...

    @property
    def logits(self) -> Tensor | None: ...


class Device(Protocol):
    """What begins steps on this rank."""

    def begin(self, run: Run, rows: Sequence[RowOptions], also: Sequence[RowOptions]) -> tuple[Decoder, Begun]:
        """A step of tokens that the host knows. rows: what its rows ask; also: those of other ranks."""
        ...

    def again(
        self, decoder: Decoder, begun: Begun, turns: Sequence[Turn], at: Sequence[int], *, over: Sequence[int]
    ) -> Begun:
        """The step behind one that may not be over; at: which of its rows each turn is. over: rows that end with it."""
        ...

    def begin_size(self, size: int) -> None:
        """Captures steps of so many rows of nobody, so that none who comes waits for it; on all ranks at once."""
        ...


@dataclass
class UnderWay:
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


class StepsAhead:
    """How steps begin, one behind another, and are read; see the module's docstring.

    schedulers: this rank's, or those of all ranks that have sequences of their own, of which `own` is this rank's.
    tell: what is chosen for the named sequences of each rank, from this rank's choices; None where all ranks choose.
    """

    def __init__(
        self,
        device: Device,
        places: InBlocks,
        schedulers: Sequence[Scheduler],
        chooser: RowChooser,
        asked: Mapping[int, Asked],
        *,
        own: int,
        tell: Callable[[Sequence[Sequence[int]], Choices], list[Choices]] | None,
    ) -> None:
        self._device, self._places, self._schedulers, self._chooser = device, places, schedulers, chooser
        self._asked, self._own, self._tell = asked, own, tell
        self.why_behind = ""
        """The option for which the host chose tokens behind a step, the last such."""

    def wants(self, latest: UnderWay) -> bool:
        """Whether anybody still wants anything of it."""
        return any(turn.number in self._asked for turn in latest.run.turns())

    def begin(self, run: Run) -> UnderWay:
        asked = self._of_rows(run)
        others = [self._asked.get(turn.number) for turn in run.turns()] if run.others else []
        reasons = [each.on_host for each in (others or asked) if each is not None]
        self.why_behind = next(filter(None, reasons), self.why_behind)
        rows, also = (
            [_NOTHING if each is None or each.on_host else each.row_options() for each in some]
            for some in (asked, others)
        )
        self._places.before(run)
        decoder, begun = self._device.begin(run, rows, also)
        at = [() if work is None else self._places.rows_at(work) for work in run.works]
        return UnderWay(run, decoder, begun, at, any(reasons))

    def begin_next(self, latest: UnderWay) -> UnderWay | None:
        """The step behind one that nobody has read; None where nobody knows yet what that is."""
        if latest.on_host or latest.void:
            return None
        smaller = [size for size in self._places.sizes if size < latest.decoder.batch]
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
        begun = self._device.again(latest.decoder, latest.begun, mine.turns, own, over=over)
        run = replace(latest.run, work=mine, others=tuple(works) if latest.run.others else ())
        return UnderWay(run, latest.decoder, begun, places, on_host=False)

    def read(self, latest: UnderWay, behind: UnderWay | None) -> list[tuple[Work, Choices]]:
        """What has come of each rank's sequences; behind: the step that has begun behind it, if one has."""
        said = latest.begun.wait()
        everyone = said.view(-1, *said.shape[-2:])
        found: list[Choices] = []
        missing: list[list[_Place]] = []
        said_of = zip(latest.run.works, latest.at, everyone.transpose(1, 2).tolist(), strict=True)
        for work, at, rows in said_of:
            known, unknown = self._told(() if work is None else work.turns, at, rows, latest.void)
            found.append(known)
            missing.append(unknown)
        if any(missing):
            numbers = [[number for _, number in each] for each in missing]
            for known, chosen in zip(found, self._chosen_behind(latest, missing[self._own], numbers), strict=True):
                known |= chosen
            if behind is not None:  # it has begun with another token, or with none
                behind.void.update(number for each in numbers for number in each)
        return [
            (_without(work, latest.void), _in_order(work, each) if unknown else each)
            for work, each, unknown in zip(latest.run.works, found, missing, strict=True)
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
        self, latest: UnderWay, own: Sequence[_Place], numbers: Sequence[Sequence[int]]
    ) -> Sequence[Choices]:
        """own: this rank's rows for which the step has not chosen; numbers: such sequences of each rank."""
        chosen: Choices = {}
        logits = latest.begun.logits
        if own and logits is not None:
            asked = [self._asked[number] for _, number in own]
            choices = self._chooser.choose(logits[[at for at, _ in own]], asked)
            chosen = {number: choice for (_, number), choice in zip(own, choices, strict=True)}
        return [chosen] if self._tell is None else self._tell(numbers, chosen)

    def _of_rows(self, run: Run) -> list[Asked | None]:
        """Who asks, in the order of the rows."""
        turns = [turn for _, turn in sorted(zip(run.at, run.work.turns, strict=True), key=lambda each: each[0])]
        return [self._asked.get(turn.number) for turn in turns]


class OwnDevice:
    """As `Device`, of ranks that make up one stage."""

    def __init__(self, places: InBlocks, steps: Steps) -> None:
        self._places, self._steps = places, steps

    def begin(self, run: Run, rows: Sequence[RowOptions], also: Sequence[RowOptions]) -> tuple[Decoder, Begun]:
        decoder, tokens, positions = self._places.decoder(self._steps, run)
        return decoder, decoder.begin(rows, tokens, positions, also=also, latest=run.latest)

    def again(
        self, decoder: Decoder, begun: Begun, turns: Sequence[Turn], at: Sequence[int], *, over: Sequence[int]
    ) -> Begun:
        assert isinstance(begun, BegunStep)
        self._places.fix(decoder, turns, at)
        return decoder.again(begun, over=over)

    def begin_size(self, size: int) -> None:
        decoder = self._places.decoder_of_nobody(self._steps, size)
        decoder.begin([RowOptions()] * size, [0] * size, [0] * size).wait()


class ChosenSteps:
    """One step behind the other on the ranks of one stage."""

    def __init__(self, ahead: StepsAhead) -> None:
        self._ahead = ahead
        self._latest: UnderWay | None = None

    @property
    def why_behind(self) -> str:
        return self._ahead.why_behind

    @property
    def under_way(self) -> Run | None:
        if self._latest is not None and not self._ahead.wants(self._latest):
            self._latest = None  # nobody wants any of it
        return None if self._latest is None else self._latest.run

    def advance(self, run: Run, *, goes_on: bool = True) -> list[tuple[Work, Choices]]:
        """What has come of each rank's sequences. run: `under_way`, if there is one. goes_on: whether the next step may
        be one of these.
        """
        latest, self._latest = self._latest or self._ahead.begin(run), None
        if goes_on:
            self._latest = self._ahead.begin_next(latest)
        return self._ahead.read(latest, self._latest)


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
    group = work.group if scheduler.limits.groups > 1 else 0  # where there is one, it says whose it is
    if not work.decode or scheduler.may_admit(group, unread=len(work.turns)):
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
    mine = sum(each.group == group for each in running.values())
    if comes or len(going) + ending < mine or needed > scheduler.pool.free:
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
