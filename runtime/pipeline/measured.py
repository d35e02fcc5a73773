"""The timeline of stages as a profile has recorded it, to stand beside the computed one (`timing.py`).

    wait   copy   run   copy   rest | wait   copy   run ..       what a rank does; | ends a piece
    idle   |---- span of a piece ---| idle   |------------

A span is all that a stage spends on a piece: the run of its graph, what it copies to and from the memory of messages,
the choice of tokens, and what its host does in between. Idle is what is left between the first piece's start and the
last one's end: waiting for a message that has not been sent, or that has not been taken yet, for the ranks that are
late to a collective of all stages, and the time before a stage's first piece and behind its last one. A message can be
taken when its sender's begin is through; where a begin cannot end before the others have come to theirs, it is waiting
until then. Where ranks have no common clock, all that a receive takes is waiting. What ranks of one stage wait for each
other in the middle of a run is part of the run.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from partitioner.errors import InputError
from runtime.execution.chrome_trace import Recorded, latest_arrivals
from runtime.pipeline.timing import Span, Timing

__all__ = ["measured"]

Interval = tuple[int, int]
Meeting = tuple[tuple[int, ...], int]
"""Which ranks, for which time."""


def measured(ranks: Sequence[Recorded]) -> Timing:
    """What the first rank of each stage did: a span for each run of its graph, in seconds since the first one began.

    ranks: of a complete `Trace`. Raises `InputError` where they are no stages, or one has run nothing.
    """
    firsts: dict[int, Recorded] = {}
    for recorded in sorted(ranks, key=lambda each: each.rank):
        firsts.setdefault(recorded.coordinates.get("pp", 0), recorded)
    if len(firsts) < 2:
        raise InputError("this profile is of one stage: there is no timeline of stages")
    if not all(recorded.runs for recorded in firsts.values()):
        raise InputError("this profile has stages that ran nothing: there is no timeline of them")
    begun: dict[Meeting, dict[int, Interval]] = {}
    for recorded in ranks:
        for each in recorded.transfers:
            group, number = each["meeting"]
            begun.setdefault((tuple(group), number), {})[recorded.rank] = each["start"], each["end"]
    hosts = {recorded.rank: recorded.host for recorded in ranks}
    latest = latest_arrivals(ranks)
    stages = {stage: _OfRank(recorded, begun, hosts, latest) for stage, recorded in sorted(firsts.items())}
    start = min(of_rank.ends[0] for of_rank in stages.values())
    stop = max(of_rank.ends[-1] for of_rank in stages.values())
    spans = [
        Span(stage, piece, (end - spent - start) / 1e9, (end - start) / 1e9)
        for stage, of_rank in stages.items()
        for piece, (spent, end) in enumerate(zip(of_rank.spent(), of_rank.ends[1:], strict=True))
    ]
    return Timing(tuple(sorted(spans, key=lambda span: span.start)), (stop - start) / 1e9, len(stages))


@dataclass
class _OfRank:
    """Nanoseconds. ends: when its first piece begins, and when each piece ends, in order; waits: in order too."""

    recorded: Recorded
    begun: dict[Meeting, dict[int, Interval]]
    hosts: dict[int, str]
    latest: dict[Meeting, int]
    ends: list[int] = field(init=False)
    waits: list[Interval] = field(init=False)

    def __post_init__(self) -> None:
        recorded = self.recorded
        self.waits = sorted(wait for wait in self._waits() if wait[0] < wait[1])
        runs = sorted((run["start"], run["end"]) for run in recorded.runs)
        received = sorted(
            each["finish"][0] for each in recorded.transfers if each["finish"] and each["from"] is not None
        )
        # a piece ends where the stage begins to take the next one, or to run it, where nothing comes
        starts = [_first_of(received, end, start) for (_, end), (start, _) in itertools.pairwise(runs)]
        first = _first_of(received, 0, runs[0][0])
        of_last = (each["end"] for each in [*recorded.steps, *recorded.transfers])
        self.ends = [next((end for start, end in self.waits if start == first), first), *starts]
        self.ends.append(max(runs[-1][1], *of_last))

    def _waits(self) -> list[Interval]:
        found = []
        for transfer in self.recorded.transfers:
            group, number = transfer["meeting"]
            begun = self.begun[tuple(group), number]
            here = {rank: begin for rank, begin in begun.items() if self.hosts[rank] == self.recorded.host}
            latest = max(start for start, _ in here.values())
            if latest <= transfer["end"]:  # the begin waits for the others, or is no later than theirs
                found.append((transfer["start"], latest))
            if transfer["finish"] is not None:
                start, end = transfer["finish"]
                _, sent = here.get(transfer["from"], (start, end))
                found.append((start, min(end, max(start, sent))))
        inside = sorted((each["start"], each["end"]) for each in [*self.recorded.runs, *self.recorded.steps])
        begins = [start for start, _ in inside]
        for call in self.recorded.calls:
            at = bisect_left(begins, call["start"] + 1) - 1
            if at < 0 or call["end"] > inside[at][1]:
                group, number = call["meeting"]
                latest = self.latest.get((tuple(group), number), call["end"])
                found.append((call["start"], min(call["end"], max(call["start"], latest))))
        return found

    def spent(self) -> list[int]:
        """On each piece, without waiting."""
        found = [end - start for start, end in itertools.pairwise(self.ends)]
        for begin, stop in self.waits:
            at = max(0, bisect_right(self.ends, begin) - 1)
            while at < len(found) and self.ends[at] < stop:
                found[at] -= min(self.ends[at + 1], stop) - max(self.ends[at], begin)
                at += 1
        return found


def _first_of(times: Sequence[int], behind: int, otherwise: int) -> int:
    """The first of sorted `times` that is no earlier than one mark, and earlier than the other."""
    at = bisect_left(times, behind)
    return times[at] if at < len(times) and times[at] < otherwise else otherwise
