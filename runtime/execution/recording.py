"""What one rank has done since its profile began, as it is noted down: runs, calls, steps, transfers; and the times."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.execution.chrome_trace import Recorded
from runtime.ops.communicating import Axes, as_axes, axes_text
from runtime.processes.place import kernel_id
from runtime.program.rank_program import RankProgram

__all__ = ["Recording"]


class Recording:
    """What one rank has done since `Profiler.start`."""

    def __init__(self, program: RankProgram, device: torch.device, *, by_node: bool = True) -> None:
        """by_node: whether runs are told node by node, or each as one."""
        self.by_node = by_node
        self.mesh, self.rank = program.mesh, program.rank
        self._device = device
        self.on_cuda = device.type == "cuda"
        at = {axis: program.coordinates[axis] for axis in program.mesh.degrees}
        self.recorded = Recorded(rank=self.rank, coordinates=at, host=kernel_id(), device=str(device))
        self._graphs: dict[int, int] = {}
        self._meetings: Counter[tuple[int, ...]] = Counter()

    def now(self) -> Any:
        """A mark: a time in nanoseconds, or an event that will have one."""
        if not self.on_cuda:
            return time.monotonic_ns()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def times(self, marks: Sequence[Any]) -> list[int]:
        """The times of marks that are past, or soon will be."""
        if not self.on_cuda:
            return list(marks)
        end = self.now()
        end.synchronize()
        ended_ns = time.monotonic_ns()
        return [ended_ns - int(mark.elapsed_time(end) * 1e6) for mark in marks]

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def graph(self, profiled: object, nodes: list[dict[str, Any]]) -> int:
        """The number of a graph in this recording."""
        if id(profiled) not in self._graphs:
            self._graphs[id(profiled)] = len(self.recorded.graphs)
            self.recorded.graphs.append(nodes)
        return self._graphs[id(profiled)]

    def meeting(self, axes: Axes, peer: int | None = None) -> list[Any]:
        """Which ranks meet next along `axes`, and how often they have met before: the same on each of them.

        `peer`: the coordinate of the one other rank, of a send or receive.
        """
        group = self.mesh.group(as_axes(axes), self.rank)
        if peer is not None:
            group = tuple(sorted((self.rank, group[peer])))
        self._meetings[group] += 1
        return [list(group), self._meetings[group] - 1]

    def add_run(self, values: Sequence[Tensor], start: Any, end: Any) -> None:
        """One that is told as a whole: a single event of computing."""
        first, last = self.times([start, end])
        name = f"run {list(values[0].shape)}" if values else "run"
        node = {"name": "run", "op": "run", "path": "", "why": "", "axis": "", "meetings": []}
        told = {"begins": [first, last], "ends": [last], "shapes": [""], "bytes": [0], "memory": [None]}
        graph = self.graph(self, [node])
        self.recorded.runs.append({"graph": graph, "name": name, "start": first, "end": last, **told, "meetings": [[]]})

    def add_step(self, name: str, start: Any, end: Any) -> None:
        first, last = self.times([start, end])
        self.recorded.steps.append({"name": name, "start": first, "end": last})

    def add_call(self, name: str, op: str, axes: Axes, start: Any, end: Any, shape: str, *, peer: int | None) -> None:
        first, last = self.times([start, end])
        call = {"name": name, "op": op, "axis": axes_text(axes), "start": first, "end": last, "shape": shape}
        self.recorded.calls.append({**call, "meeting": self.meeting(axes, peer)})

    def add_transfer(
        self, told: dict[str, Any], axes: Axes, peer: int | None, start: Any, end: Any, handle: Handle
    ) -> Handle:
        """What has begun, from `start` to `end`; its finish is recorded when it comes."""
        first, last = self.times([start, end])
        transfer: dict[str, Any] = {**told, "start": first, "end": last, "finish": None}
        self.recorded.transfers.append({**transfer, "meeting": self.meeting(axes, peer)})
        entry = self.recorded.transfers[-1]

        def finish() -> Tensor:
            before = self.now()
            result = handle.finish()
            entry["finish"] = self.times([before, self.now()])
            return result

        return Handle(finish)
