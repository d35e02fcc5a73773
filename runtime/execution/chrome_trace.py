"""The recordings of all ranks as one trace in the Chrome trace event format, which ui.perfetto.dev and chrome://tracing
open.

    one process per rank; tracks "steps" (runs, and the modules inside them), "compute", "communication", "waiting",
    "transfers" (what goes from stage to stage, with arrows between the ranks); a counter of memory

A collective cannot finish before the last rank has come to it. Where the ranks share a clock, the time until then is
*waiting*, and the rest is *communication*:

    rank 0   ......|-- waiting --|- communication -|          the last to come does not wait
    rank 1   .....................|- communication -|

Waiting is what uneven work costs; it is not made shorter by a faster network.
Format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.communication.communicator import Communicator
from runtime.ops.collectives import all_gather

__all__ = ["Recorded", "Totals", "Trace", "from_all_ranks", "latest_arrivals"]

TRACKS = ("steps", "compute", "communication", "waiting", "transfers")
_OFF_NS = 200_000
"""Marks may be off by this much; more, and the ranks have no common clock."""


@dataclass
class Recorded:
    """What one rank did, as plain data: `graphs` (their nodes), `runs` of them, `calls` outside graphs, `steps`.

    transfers: sends, receives and permutes between stages, whose begin and finish are two spans.
    """

    rank: int
    coordinates: dict[str, int]
    host: str
    device: str
    graphs: list[list[dict[str, Any]]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    transfers: list[dict[str, Any]] = field(default_factory=list)

    def meetings(self) -> Iterator[tuple[tuple[tuple[int, ...], int], int, int]]:
        """Every collective: which ranks met for which time, when this one came and when it left.

        Without the nodes that meet others several times: between begin and end of those, nothing is known.
        """
        for run in self.runs:
            for at, meetings in enumerate(run["meetings"]):
                if len(meetings) == 1:
                    (meeting,) = meetings
                    yield (tuple(meeting[0]), meeting[1]), run["begins"][at], run["ends"][at]
        for call in self.calls:
            yield (tuple(call["meeting"][0]), call["meeting"][1]), call["start"], call["end"]


@dataclass(frozen=True)
class Totals:
    """Seconds of one rank. steps: from the beginning to the end of each; recording: what the recording itself took.

    transfers: between stages, and so between steps: beginning them, and waiting for what comes.
    """

    rank: int
    steps: float
    compute: float
    communication: float
    waiting: float
    recording: float
    transfers: float = 0.0

    @property
    def told(self) -> float:
        """The share of the steps that the three kinds of events cover."""
        return (self.compute + self.communication + self.waiting) / self.steps if self.steps else 1.0


class Trace:
    """See the module's docstring. Complete once the block that records it is left."""

    def __init__(self) -> None:
        self._ranks: list[Recorded] | None = None
        self._latest: dict[tuple[tuple[int, ...], int], int] = {}

    @property
    def ranks(self) -> list[Recorded]:
        if self._ranks is None:
            raise InputError("this trace is not complete: leave the `with ...profile() as trace:` block first")
        return self._ranks

    def complete(self, ranks: Sequence[Recorded]) -> None:
        self._ranks = sorted(ranks, key=lambda recorded: recorded.rank)
        self._latest = latest_arrivals(self._ranks)

    def save(self, path: str | Path) -> None:
        """Write the file that viewers open."""
        content = {
            "traceEvents": self.events(),
            "displayTimeUnit": "ms",
            "otherData": {"hosts": len({recorded.host for recorded in self.ranks})},
        }
        Path(path).write_text(json.dumps(content), encoding="utf-8")

    def events(self) -> list[dict[str, Any]]:
        """In the trace event format; times in microseconds since the first event of any rank."""
        found = [event for recorded in self.ranks for event in self._of_rank(recorded)]
        zero = min((event["ts"] for event in found), default=0)
        for event in found:
            event["ts"] = (event["ts"] - zero) / 1000
            if "dur" in event:
                event["dur"] /= 1000
        return [event for recorded in self.ranks for event in _names(recorded)] + found

    def totals(self) -> list[Totals]:
        """One row per rank."""
        found = []
        for recorded in self.ranks:
            spent = dict.fromkeys(TRACKS, 0)
            for event in self._of_rank(recorded):
                if event["ph"] == "X" and event["tid"]:
                    spent[TRACKS[event["tid"]]] += event["dur"]
            wall = sum(step["end"] - step["start"] for step in [*recorded.runs, *recorded.steps])
            own = sum(
                begin - end for run in recorded.runs for begin, end in zip(run["begins"][1:], run["ends"], strict=True)
            )
            seconds = [time / 1e9 for time in (wall, *(spent[track] for track in TRACKS[1:4]), own, spent["transfers"])]
            found.append(Totals(recorded.rank, *seconds))
        return found

    def __str__(self) -> str:
        rows = self.totals()
        staged = any(row.transfers for row in rows)
        lines = ["rank   steps [ms]   compute   communication   waiting   recording"]
        lines[0] += "   between stages [ms]" if staged else ""
        for row in rows:
            told = (row.compute, row.communication, row.waiting, row.recording)
            shares = [f"{part / row.steps if row.steps else 0:.1%}" for part in told]
            lines.append(
                f"{row.rank:>4}{row.steps * 1e3:>13.1f}{shares[0]:>10}{shares[1]:>16}{shares[2]:>10}{shares[3]:>12}"
            )
            lines[-1] += f"{row.transfers * 1e3:>22.1f}" if staged else ""
        return "\n".join(lines)

    # -- one rank's events, times in nanoseconds -----------------------------------------------------------------------

    def _of_rank(self, recorded: Recorded) -> Iterator[dict[str, Any]]:
        for run in recorded.runs:
            yield _span(recorded.rank, 0, run["name"], run["start"], run["end"], {})
            nodes = recorded.graphs[run["graph"]]
            yield from _modules(recorded.rank, nodes, run)
            for at, node in enumerate(nodes):
                yield from self._of_node(recorded, run, at, node)
        for step in recorded.steps:
            yield from self._of_step(recorded, step)
        for call in recorded.calls:
            told = {"op": f"{call['op']} over {call['axis']}", "shape": call["shape"]}
            yield from self._met(recorded, call["name"], call["start"], call["end"], call["meeting"], told)
        for transfer in recorded.transfers:
            yield from self._transferred(recorded, transfer)

    def _transferred(self, recorded: Recorded, transfer: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What begins and what waits for its end as spans; an arrow from the sender's begin to the receiver's end."""
        rank, to, from_ = recorded.rank, transfer["to"], transfer["from"]
        told = {"op": transfer["op"], "shape": transfer["shape"]}
        told |= {word: f"rank {other}" for word, other in (("to", to), ("from", from_)) if other is not None}
        name = transfer["name"]
        yield _span(rank, 4, f"begin {name}", transfer["start"], transfer["end"], told)
        if transfer["finish"] is not None:
            start, end = transfer["finish"]
            yield _span(rank, 4, f"finish {name}", start, end, told)
        hosts = {each.rank: each.host for each in self.ranks}
        group, number = transfer["meeting"]
        for phase, sender, other, ts in (
            ("s", rank, to, transfer["start"]),
            ("f", from_, from_, max(transfer["finish"][0], transfer["finish"][1] - 1) if transfer["finish"] else None),
        ):
            if other is None or ts is None or hosts.get(other) != recorded.host:
                continue  # nobody there, or by another clock
            arrow = f"{'-'.join(map(str, group))}:{number}:{sender}"
            event = {"ph": phase, "id": arrow, "name": "transfer", "cat": "transfers", "pid": rank, "tid": 4, "ts": ts}
            yield event | ({"bp": "e"} if phase == "f" else {})

    def _of_node(
        self, recorded: Recorded, run: dict[str, Any], at: int, node: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        start, end, meetings = run["begins"][at], run["ends"][at], run["meetings"][at]
        over = f" over {node['axis']}" if node["axis"] else ""
        told = {"op": node["op"] + over, "path": node["path"], "why": node["why"]}
        told = {**{name: text for name, text in told.items() if text}, "shape": run["shapes"][at]}
        told_all = {**told, "bytes": run["bytes"][at]}
        if not meetings:
            yield _span(recorded.rank, 1, node["name"], start, end, told_all)
        elif len(meetings) == 1:
            yield from self._met(recorded, node["name"], start, end, meetings[0], told_all)
        else:
            told_all["waiting"] = f"cannot be told apart: {len(meetings)} meetings in one node"
            yield _span(recorded.rank, 2, node["name"], start, end, {**told_all, "meetings": meetings})
        if run["memory"][at] is None:
            return
        name = "live values" if recorded.device == "cpu" else "allocated"
        most, after = run["memory"][at]
        yield {"ph": "C", "name": "memory", "pid": recorded.rank, "tid": 0, "ts": end, "args": {name: most}}
        if after != most:
            yield {
                "ph": "C", "name": "memory", "pid": recorded.rank, "tid": 0, "ts": run["begins"][at + 1],
                "args": {name: after},
            }  # fmt: skip

    def _of_step(self, recorded: Recorded, step: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What is no run of a graph: on the track of steps, and as computing between its collectives."""
        name, place, end = step["name"], step["start"], step["end"]
        yield _span(recorded.rank, 0, name, place, end, {})
        for call in recorded.calls:
            if place <= call["start"] and call["end"] <= end:
                yield _span(recorded.rank, 1, name, place, call["start"], {})
                place = call["end"]
        yield _span(recorded.rank, 1, name, place, end, {})

    def _met(
        self, recorded: Recorded, name: str, start: int, end: int, meeting: list[Any], told: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """A collective, as the wait for the last rank and what follows; together as one where that cannot be told."""
        key = (tuple(meeting[0]), meeting[1])
        told = {**told, "ranks": meeting[0], "meeting": meeting[1]}
        latest = self._latest.get(key)
        if latest is None:
            told["waiting"] = "cannot be told apart: these ranks have no common clock, or some were not recorded"
            yield _span(recorded.rank, 2, name, start, end, told)
            return
        middle = min(max(latest, start), end)
        if middle > start:
            yield _span(recorded.rank, 3, name, start, middle, told)
        yield _span(recorded.rank, 2, name, middle, end, told)


def latest_arrivals(ranks: Sequence[Recorded]) -> dict[tuple[tuple[int, ...], int], int]:
    """When the last rank came to each meeting; without those of which that cannot be said."""
    hosts = {recorded.rank: recorded.host for recorded in ranks}
    marks: dict[tuple[tuple[int, ...], int], dict[int, tuple[int, int]]] = {}
    for recorded in ranks:
        for key, start, end in recorded.meetings():
            marks.setdefault(key, {})[recorded.rank] = (start, end)
    found = {}
    for (group, number), by_rank in marks.items():
        if set(by_rank) != set(group) or len({hosts[rank] for rank in group}) > 1:
            continue
        latest = max(start for start, _ in by_rank.values())
        # nobody leaves before the last has come: if so, it is by another clock
        if latest <= min(end for _, end in by_rank.values()) + _OFF_NS:
            found[group, number] = latest
    return found


def _span(rank: int, track: int, name: str, start: int, end: int, told: dict[str, Any]) -> dict[str, Any]:
    span = {"ph": "X", "name": name, "cat": TRACKS[track], "pid": rank, "tid": track, "ts": start, "dur": end - start}
    return {**span, "args": told}


def _modules(rank: int, nodes: Sequence[dict[str, Any]], run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Spans of the modules that nodes came from, inside one another."""
    open_: list[tuple[str, int]] = []
    ended = run["start"]
    for at, node in enumerate([*nodes, {"path": ""}]):
        parts = node["path"].split(".") if node["path"] else []
        shared = 0
        while shared < min(len(parts), len(open_)) and open_[shared][0] == parts[shared]:
            shared += 1
        while len(open_) > shared:
            path = ".".join(name for name, _ in open_)
            name, start = open_.pop()
            yield _span(rank, 0, name, start, ended, {"path": path})
        if at < len(nodes):
            open_ += [(part, run["begins"][at]) for part in parts[shared:]]
            ended = run["ends"][at]


def _names(recorded: Recorded) -> Iterator[dict[str, Any]]:
    where = " ".join(f"{axis}={at}" for axis, at in recorded.coordinates.items())
    name = f"rank {recorded.rank} ({where})" if where else f"rank {recorded.rank}"
    process = {"ph": "M", "pid": recorded.rank, "tid": 0, "ts": 0}
    yield {**process, "name": "process_name", "args": {"name": name}}
    yield {**process, "name": "process_sort_index", "args": {"sort_index": recorded.rank}}
    for track, title in enumerate(TRACKS):
        yield {**process, "tid": track, "name": "thread_name", "args": {"name": title}}
        yield {**process, "tid": track, "name": "thread_sort_index", "args": {"sort_index": track}}


def from_all_ranks(mine: Recorded, communicator: Communicator, device: torch.device) -> list[Recorded]:
    """Every rank's recording, on every rank: a collective along each axis in turn."""
    known = [asdict(mine)]
    for axes in communicator.mesh.single_axes:
        gather = communicator.bind(all_gather, axes, node="profile", options={"dim": 0})
        message = torch.frombuffer(bytearray(json.dumps(known).encode()), dtype=torch.uint8).to(device)
        sizes: list[int] = gather(torch.tensor([message.numel()], device=device)).tolist()
        # of one size, for which every communicator has its quickest way
        padded = torch.cat([message, message.new_zeros(max(sizes) - message.numel())])
        everyone: Tensor = gather(padded).view(len(sizes), -1).cpu()
        texts = [row[:size].numpy().tobytes() for row, size in zip(everyone, sizes, strict=True)]
        known = [recorded for text in texts for recorded in json.loads(text)]
    return [Recorded(**recorded) for recorded in known]
