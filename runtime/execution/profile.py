"""Recording what one rank does, node by node: another way to run the graph that its executable runs.

    x = linear(a, w)          ->   x = linear(a, w);  stamp(x)

The stamp takes the time before and after its own work, so that a node's time is from the last stamp's end to the next
one's beginning, and what recording costs is known apart. The same ops run on the same operands in the same order, and
values live as long as without it. Nothing of this exists until it is asked for.

On CUDA the marks are events on the stream, read when the run is through; elsewhere they are the host's monotonic clock,
which the processes of one machine share. What the recordings of all ranks say together is in `chrome_trace.py`.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from partitioner.errors import InputError
from runtime.communication.channels import Channel
from runtime.communication.communicator import Communicator
from runtime.execution.chrome_trace import Recorded
from runtime.execution.overflow import Overflow
from runtime.execution.recording import Recording
from runtime.execution.routing import Routing
from runtime.execution.watched_channels import TransferChannel, WatchedCommunicator
from runtime.ops.communicating import COMMUNICATING, axes_text
from runtime.program.rank_program import RankProgram

__all__ = ["Profiled", "Profiler", "Recording"]

R = TypeVar("R")
_CALLS = ("call_function", "call_method")


class Profiler:
    """One rank's switch; `recording` is where its executables write while it is on, None otherwise."""

    def __init__(self, program: RankProgram, device: torch.device) -> None:
        self.program, self.device = program, device
        self.recording: Recording | None = None
        self.routing: Routing | None = None
        """Where the tokens of experts are counted while that is asked for."""
        self.overflow = Overflow()
        """What full experts have left out, which is always counted."""

    def start(self, *, by_node: bool = True) -> None:
        if self.recording is not None:
            raise InputError("this engine is being profiled already: profiles do not nest")
        self.recording = Recording(self.program, self.device, by_node=by_node)

    def stop(self) -> Recorded:
        assert self.recording is not None
        recorded, self.recording = self.recording.recorded, None
        return recorded

    def watched(self, communicator: Communicator) -> Communicator:
        """`communicator`, whose operations are recorded if a recording is on now."""
        return communicator if self.recording is None else WatchedCommunicator(communicator, self.recording)

    def watched_transfers(self, channel: Channel) -> Channel:
        """`channel`, of which every use is recorded that a recording is on for; it may be kept."""
        return TransferChannel(channel, lambda: self.recording)

    def timed(self, name: str, function: Callable[..., R]) -> Callable[..., R]:
        """`function` as a step of its own, if a recording is on now."""
        recording = self.recording
        if recording is None:
            return function

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> R:
            start = recording.now()
            result = function(*args, **kwargs)
            recording.add_step(name, start, recording.now())
            return result

        return run


class Profiled:
    """The bound `graph` of `program`, with a stamp after every call."""

    def __init__(self, program: RankProgram, graph: fx.Graph, weights: Sequence[Tensor]) -> None:
        self.nodes = [_described(node) for node in program.graph.nodes if node.op in _CALLS]
        """Of each call: its name, op, module, reason, and the axes and meetings of one that communicates."""
        self._dying = _dying(graph)
        self._kept = {weight.untyped_storage().data_ptr() for weight in weights}
        self._begins: list[Any] = []
        self._ends: list[Any] = []
        self._seen: list[Any] = []
        self._now: Callable[[], Any] = time.monotonic_ns
        self._allocated: Callable[[], int] | None = None
        self._function = functools.partial(_stamped(graph, self._stamp), *weights)
        assert len(self.nodes) == len(self._dying)

    def __call__(self, recording: Recording, values: Sequence[Tensor]) -> Any:
        self._begins, self._ends, self._seen = [], [], []
        self._now, self._allocated = recording.now, recording.allocated if recording.on_cuda else None
        start = self._now()
        self._begins.append(self._now())
        result = self._function(*values)
        self._write(recording, start, self._now(), values)
        return result

    def _stamp(self, value: Any) -> None:
        self._ends.append(self._now())
        self._seen.append(_memory(value) if self._allocated is None else (_memory(value), self._allocated()))
        self._begins.append(self._now())

    def _write(self, recording: Recording, start: Any, end: Any, values: Sequence[Tensor]) -> None:
        num = len(self._ends)
        first, last, *times = recording.times([start, end, *self._begins, *self._ends])
        begins, ends = times[: num + 1], times[num + 1 :]
        seen = self._seen if self._allocated is None else [pieces for pieces, _ in self._seen]
        if self._allocated is None:
            kept = self._kept | {value.untyped_storage().data_ptr() for value in values}
            memory = _live_bytes(seen, self._dying, kept)
        else:
            memory = [(allocated, allocated) for _, allocated in self._seen]
        recording.recorded.runs.append(
            {
                "graph": recording.graph(self, self.nodes),
                "name": f"run {list(values[0].shape)}" if values else "run",
                "start": first,
                "end": last,
                "begins": begins,
                "ends": ends,
                "shapes": [", ".join(piece[0] for piece in pieces) for pieces in map(_texts, seen)],
                "bytes": [sum(piece[1] for piece in pieces) for pieces in map(_texts, seen)],
                "memory": memory,
                "meetings": [[recording.meeting(*meeting) for meeting in node["meetings"]] for node in self.nodes],
            }
        )
        self._begins, self._ends, self._seen = [], [], []


def _stamped(graph: fx.Graph, stamp: Callable[[Any], None]) -> Callable[..., Any]:
    def take(value: Any) -> None:  # generated code calls functions, under their names
        stamp(value)

    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in [node for node in copy.nodes if node.op in _CALLS]:
        with copy.inserting_after(node):
            copy.call_function(take, (node,))
    function: Callable[..., Any] = fx.GraphModule({}, copy).forward
    return function


def _described(node: fx.Node) -> dict[str, Any]:
    if isinstance(node.target, str):
        op = node.target
    else:
        assert callable(node.target)
        op = getattr(node.target, "__name__", None) or str(node.target)
    meetings = COMMUNICATING[node.target].meetings(node) if node.target in COMMUNICATING else ()
    meta = node.meta
    return {
        "name": node.name,
        "op": op,
        "path": str(meta.get("path") or ""),
        "why": str(meta.get("why") or ""),
        "axis": ", ".join(dict.fromkeys(axes_text(meeting.axes) for meeting in meetings)),
        "meetings": [(list(meeting.axes), meeting.peer) for meeting in meetings],
    }


def _dying(graph: fx.Graph) -> list[list[int]]:
    """By place of a call: the calls whose values nobody reads after it. The result outlives the run."""
    calls = [node for node in graph.nodes if node.op in _CALLS]
    place = {node: i for i, node in enumerate(calls)}
    dying: list[list[int]] = [[] for _ in calls]
    for i, node in enumerate(calls):
        last = max((place.get(user, len(calls)) for user in node.users), default=i)
        if last < len(calls):
            dying[last].append(i)
    return dying


Piece = tuple[torch.Size, torch.dtype, int, int]
"""Shape, dtype, and the place and size of the memory."""


def _memory(value: Any) -> list[Piece]:
    """Of each tensor in `value`; next to nothing, for it is done while the rank runs."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return [(value.shape, value.dtype, storage.data_ptr(), storage.nbytes())]
    if isinstance(value, (tuple, list)):
        return [piece for each in value for piece in _memory(each)]
    return []


def _texts(pieces: Sequence[Piece]) -> list[tuple[str, int]]:
    return [
        (f"{str(dtype).removeprefix('torch.')}{list(shape)}", shape.numel() * dtype.itemsize)
        for shape, dtype, _, _ in pieces
    ]


def _live_bytes(seen: Sequence[Sequence[Piece]], dying: list[list[int]], kept: set[int]) -> list[tuple[int, int]]:
    """After each call: the bytes of all values that are alive, before and after those that it was the last to read go.

    Values that share memory count once; those that lie in the memory of weights or inputs do not.
    """
    holders: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    total, found = 0, []
    for i, pieces in enumerate(seen):
        for _, _, place, size in pieces:
            if place in kept or not size:
                continue
            if not holders[place]:
                total += size
                sizes[place] = size
            holders[place] += 1
        most = total
        for dead in dying[i]:
            for _, _, place, size in seen[dead]:
                if place in kept or not size:
                    continue
                holders[place] -= 1
                if not holders[place]:
                    total -= sizes[place]
        found.append((most, total))
    return found
