"""When each action of a schedule takes place, given how long a piece takes on each stage: the computed timeline.

    seconds[stage][n]       of the stage's n-th `Run`; those beyond the list start again at its head
    transfer                from the end of a `Run` to when the next stage has what it made

A receive that has begun costs nothing until its `Run`; a `Shift` ends for all stages when the last has come to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from partitioner.errors import InputError
from runtime.pipeline.schedule import Action, Receive, Run, Send, Shift, Timelines

__all__ = ["Span", "Timing", "one_at_a_time", "time_of"]


@dataclass(frozen=True)
class Span:
    """A piece on a stage, from start to stop."""

    stage: int
    piece: int
    start: float
    stop: float


@dataclass(frozen=True)
class Timing:
    """stop: when all is done. bubble: the share of the stages' time in which they are idle."""

    spans: tuple[Span, ...]
    stop: float
    stages: int

    @property
    def bubble(self) -> float:
        busy = sum(span.stop - span.start for span in self.spans)
        return 1 - busy / (self.stop * self.stages) if self.stop else 0.0

    @property
    def seconds(self) -> list[list[float]]:
        """As `time_of` takes them: by stage, how long each of its spans is."""
        found: list[list[float]] = [[] for _ in range(self.stages)]
        for span in sorted(self.spans, key=lambda span: span.start):
            found[span.stage].append(span.stop - span.start)
        return found


def time_of(timelines: Timelines, seconds: Sequence[Sequence[float]], *, transfer: float = 0.0) -> Timing:
    """Raises `InputError` where the schedule waits for ever."""
    clock = _Clock(timelines, seconds, transfer)
    while sum(clock.advance(stage) for stage in range(len(timelines))):  # every stage gets its turn
        pass
    left = [stage for stage, actions in enumerate(timelines) if clock.at[stage] < len(actions)]
    if left:
        raise InputError(f"this schedule waits for ever: stages {left} for what is never sent")
    return Timing(tuple(clock.spans), max(clock.now, default=0.0), len(timelines))


def one_at_a_time(seconds: Sequence[Sequence[float]], pieces: int) -> Timing:
    """What a pipeline takes in which a piece starts when the last stage is done with the one before."""
    spans: list[Span] = []
    now = 0.0
    for piece in range(pieces):
        for stage, times in enumerate(seconds):
            spans.append(Span(stage, piece, now, now + times[piece % len(times)]))
            now = spans[-1].stop
    return Timing(tuple(spans), now, len(seconds))


@dataclass
class _Clock:
    timelines: Timelines
    seconds: Sequence[Sequence[float]]
    transfer: float
    spans: list[Span] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.timelines)
        self.at, self.now, self.shifts, self.runs = [0] * count, [0.0] * count, [0] * count, [0] * count
        self.sent: dict[tuple[int, int], float] = {}
        """By the stage that receives, and the piece: when it has come."""
        self.awaited: list[set[int]] = [set() for _ in range(count)]
        self.arrived: list[dict[int, float]] = []
        """By the number of a shift: when each stage came to it."""

    def advance(self, stage: int) -> bool:
        """Goes on as far as the stage can; whether that is at all."""
        begun = self.at[stage]
        actions = self.timelines[stage]
        while self.at[stage] < len(actions) and self._do(stage, actions[self.at[stage]]):
            self.at[stage] += 1
        return self.at[stage] > begun

    def _do(self, stage: int, action: Action) -> bool:
        match action:
            case Receive(piece):
                self.awaited[stage].add(piece)
            case Send(piece):
                self.sent[(stage + 1) % len(self.timelines), piece] = self.now[stage] + self.transfer
            case Run(piece):
                start = self.now[stage]
                if piece in self.awaited[stage]:
                    if (stage, piece) not in self.sent:
                        return False
                    start = max(start, self.sent.pop((stage, piece)))
                    self.awaited[stage].discard(piece)
                times = self.seconds[stage]
                self.now[stage] = start + times[self.runs[stage] % len(times)]
                self.runs[stage] += 1
                self.spans.append(Span(stage, piece, start, self.now[stage]))
            case Shift():
                number = self.shifts[stage]
                if len(self.arrived) == number:
                    self.arrived.append({})
                arrived = self.arrived[number]
                arrived.setdefault(stage, self.now[stage])
                if len(arrived) < len(self.timelines):
                    return False
                self.now[stage] = max(arrived.values()) + self.transfer
                self.shifts[stage] += 1
        return True
