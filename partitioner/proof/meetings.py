"""The order of communication of all ranks, played through before anything runs: nobody waits for ever.

    event      one primitive that a rank performs with others, in its program's order
    rule       nothing is buffered: an event takes place when it is the next one of all its members, and they agree on
               it (primitive, axes, shape, dtype, options; of sizes that depend on data, the node that they come from)
    refused    members that are at different events of one group; ranks that wait for each other in a circle; a rank
               that waits for one that has ended

What is begun and finished later meets at its beginning; the finish is local. A program that runs through here runs
through whatever the links buffer. The game is that of Hilbrich et al., "MPI Runtime Error Detection with MUST" (2013),
section 4, on programs in place of traces.

Ranks whose timelines are the same and have collectives only cannot wait for each other: at every step all are at the
same event, whose groups part them. That is how all ranks of one graph are proven at the cost of one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from partitioner.errors import PlanError, RankMismatch
from partitioner.sharding.mesh import Mesh
from runtime.ops.communicating import COMMUNICATING, Meeting, axes_text, read_call
from runtime.program.rank_program import RankProgram

__all__ = ["Event", "check_meetings", "events_of", "play"]

_MOST_NAMED = 6


@dataclass(frozen=True)
class Event:
    """A meeting of a rank: at which node, with what options, and where that is ("stage 1, piece 3"; "" for nothing)."""

    node: str
    meeting: Meeting
    options: tuple[tuple[str, Any], ...] = ()
    where: str = ""

    def __str__(self) -> str:
        meeting = self.meeting
        what = f"{meeting.kind} over {axes_text(meeting.axes)}"
        if meeting.peer is not None:
            what += f" {'to' if meeting.kind == 'send' else 'from'} coordinate {meeting.peer}"
        if meeting.shape is not None:
            what += f", {str(meeting.dtype).removeprefix('torch.')}[{', '.join(map(str, meeting.shape))}]"
        if meeting.sizes_from is not None:
            what += f", sizes from {meeting.sizes_from!r}"
        options = "".join(f", {name}={value}" for name, value in self.options)
        return f"node {self.node!r}, {what}{options}{f' ({self.where})' if self.where else ''}"


def events_of(graph: fx.Graph) -> tuple[Event, ...]:
    """What a rank does together with others when it runs `graph`, in order."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in COMMUNICATING:
            options = tuple((name, _plain(value)) for name, value in sorted(read_call(node).options.items()))
            found += [Event(node.name, meeting, options) for meeting in COMMUNICATING[node.target].meetings(node)]
    return tuple(found)


def check_meetings(programs: Iterable[RankProgram]) -> None:
    """Raises `RankMismatch` where these programs, one per rank of a mesh, would not come through together."""
    known: dict[int, tuple[Event, ...]] = {}
    timelines = {}
    mesh: Mesh | None = None
    for program in programs:
        mesh = program.mesh
        # ranks that run the same have one graph
        if id(program.graph) not in known:
            known[id(program.graph)] = events_of(program.graph)
        timelines[program.rank] = known[id(program.graph)]
    if mesh is not None:
        play(mesh, timelines)


def play(mesh: Mesh, timelines: Mapping[int, Sequence[Event]]) -> None:
    """Raises `RankMismatch`, naming ranks and nodes, where the ranks would not come through."""
    if len(timelines) != mesh.world_size:
        raise RankMismatch(f"the mesh has {mesh.world_size} ranks, and {len(timelines)} of them have a program")
    if _alike(mesh, timelines):
        return
    at = dict.fromkeys(timelines, 0)
    groups: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def event(rank: int) -> Event | None:
        line = timelines[rank]
        return line[at[rank]] if at[rank] < len(line) else None

    def members(rank: int, event: Event) -> tuple[int, ...]:
        key = (rank, event.meeting.axes, event.meeting.peer, event.meeting.kind)
        if key not in groups:
            groups[key] = _members(mesh, rank, event)
        return groups[key]

    ready = list(timelines)
    while ready:
        rank = ready.pop()
        mine = event(rank)
        if mine is None:
            continue
        together = members(rank, mine)
        others = {other: event(other) for other in together}
        if any(each is None or members(other, each) != together for other, each in others.items()):
            continue  # somebody is elsewhere: whoever gets here last looks again
        for other, each in others.items():
            assert each is not None
            if _agreed(rank, mine, together) != _agreed(other, each, together):
                raise RankMismatch(
                    f"ranks {rank} and {other} disagree on what they do together:\n  rank {rank}: {mine}\n"
                    f"  rank {other}: {each}"
                )
        for other in together:
            at[other] += 1
        ready += together
    stuck = {rank: found for rank in timelines if (found := event(rank)) is not None}
    if stuck:
        raise _stuck(stuck, {rank: members(rank, each) for rank, each in stuck.items()})


def _alike(mesh: Mesh, timelines: Mapping[int, Sequence[Event]]) -> bool:
    """Whether all ranks run the same collectives in the same order."""
    lines = {id(line): line for line in timelines.values()}
    first, *others = lines.values()
    if any(event.meeting.peer is not None for line in lines.values() for event in line):
        return False
    for event in first:
        mesh.size(*event.meeting.axes)  # raises for axes of two views
    wanted = [_of_all(event) for event in first]
    return all([_of_all(event) for event in line] == wanted for line in others)


def _of_all(event: Event) -> tuple[Any, ...]:
    """What all members of a collective must agree on."""
    meeting = event.meeting
    return (meeting.kind, meeting.axes, _shape(event), str(meeting.dtype), event.options, meeting.sizes_from)


def _shape(event: Event) -> Any:
    """Without the dim along which pieces may differ, and the counts that each rank has for itself."""
    shape = event.meeting.shape
    if shape is None or event.meeting.kind == "all_to_all":
        return None if shape is None else tuple(map(str, shape[1:]))
    found: list[str | None] = [*_spelled(tuple(shape))]
    options = dict(event.options)
    if event.meeting.kind == "all_gather" and isinstance(options.get("dim"), int):
        found[options["dim"]] = None
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _spelled(shape: tuple[Any, ...]) -> tuple[str, ...]:
    """Remembered, as the pieces of a schedule have the same few: sympy takes its time to print."""
    return tuple(map(str, shape))


def _agreed(rank: int, event: Event, together: tuple[int, ...]) -> tuple[Any, ...]:
    meeting = event.meeting
    if meeting.peer is None:
        return _of_all(event)
    (other,) = (each for each in together if each != rank)
    sender, receiver = (rank, other) if meeting.kind == "send" else (other, rank)
    return ("message", sender, receiver, _shape(event), str(meeting.dtype), meeting.sizes_from)


def _members(mesh: Mesh, rank: int, event: Event) -> tuple[int, ...]:
    meeting = event.meeting
    try:
        group = mesh.group(meeting.axes, rank)
    except PlanError as error:
        raise RankMismatch(f"rank {rank}: {event}: {error}") from None
    if meeting.peer is None:
        return group
    if not 0 <= meeting.peer < len(group) or group[meeting.peer] == rank:
        raise RankMismatch(
            f"rank {rank}: {event}: its group has the coordinates 0 to {len(group) - 1}, and this is one"
        )
    return tuple(sorted((rank, group[meeting.peer])))


def _stuck(stuck: Mapping[int, Event], members: Mapping[int, tuple[int, ...]]) -> RankMismatch:
    """What to say of ranks that cannot go on: a circle, if there is one, or who waits for a rank that has ended."""
    awaited = {
        rank: [other for other in together if other not in stuck or members[other] != together]
        for rank, together in members.items()
    }
    for rank, others in awaited.items():
        gone = [other for other in others if other not in stuck]
        if gone:
            waiting = [rank, *(other for other in stuck if other != rank)][:_MOST_NAMED]
            lines = "\n".join(f"  rank {each}: {stuck[each]}" for each in waiting)
            return RankMismatch(f"rank {rank} waits for rank {gone[0]}, which has nothing more to do:\n{lines}")
    # everybody waits for somebody who waits: following that leads into a circle
    path, rank = list[int](), min(stuck)
    while rank not in path:
        path.append(rank)
        # who is at an event of the same members waits with this rank, not for it
        rank = next((other for other in awaited[rank] if other != rank), min(awaited[rank], default=rank))
    circle = path[path.index(rank) :]
    lines = "\n".join(f"  rank {each}: {stuck[each]}" for each in circle)
    return RankMismatch(f"ranks {', '.join(map(str, circle))} wait for each other in a circle:\n{lines}")


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value
