"""Ranks of one process that write into each other's memory by `PeerRows` itself, over what stands in for GPUs.

What `push_rows_kernel` does is in plain torch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from unittest.mock import create_autospec

import pytest
import torch
from torch import Tensor

from runtime.communication.group_collectives import Group
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.communication.peer_memory.rows import push_rows
from runtime.communication.peer_memory.rows.push_rows import PeerRows
from runtime.communication.thread_communicator import ThreadChannel
from runtime.ops.rows.row_moves import ALIGNED

AHEAD = 24
"""Bytes of an allocation before the memory that a rank has of it."""


class Handle:
    """Of torch's symmetric memory, what is used."""

    def __init__(self, memories: list[Tensor]) -> None:
        self.memories = memories
        self.buffer_ptrs = [memory.data_ptr() for memory in memories]


def put_rows(
    table: Tensor, sources: Sequence[Tensor], height: int, memories: list[Tensor], *, own: Tensor | None, rank: int
) -> None:
    for fields in table.tolist():
        source, head, to, start, batch, row, rows, cut, read, late, written, late_written, words = fields
        x = sources[source]
        item = x.element_size()
        assert rows <= height
        assert not any(stride * item % ALIGNED for stride in x.stride()[:-1])
        target = memories[to] if own is None or to != rank else own
        numbers = target.view(-1).view(torch.uint8).view(x.dtype)
        for b in range(x.shape[0]):
            for r in range(rows):
                value = x[b, head, r + (late if r >= cut else read)]
                at = (start + b * batch + (r + (late_written if r >= cut else written)) * row) // item
                assert at + len(value) <= len(numbers)
                numbers[at : at + words * 4 // item] = value


def writing(monkeypatch: pytest.MonkeyPatch, parts: int, *, most: int = 1 << 30) -> list[int]:
    """Makes channels of threads write so, into memory of up to `most` bytes; counts who has asked for it."""
    allocated: dict[str, list[Tensor]] = {}
    made: dict[int, PeerRows] = {}
    channels: dict[int, ThreadChannel] = {}
    asked, lock = list[int](), threading.Lock()

    def mapped(group: Group, device: torch.device, name: str, *, num_bytes: int) -> tuple[Tensor, Handle]:
        if num_bytes > most:
            raise RuntimeError("out of memory")
        with lock:
            if name not in allocated:
                allocated[name] = [torch.empty(AHEAD + num_bytes, dtype=torch.uint8) for _ in range(parts)]
        memories = allocated[name]
        return memories[group.coordinate][AHEAD:], Handle(memories)

    def write(
        self: PeerRows, table: Tensor, sources: Sequence[Tensor], height: int, *, own: Tensor | None = None
    ) -> None:
        assert self._starts is not None
        memories = [memory[AHEAD:] for memory in self._handle.memories]
        assert [memory.data_ptr() for memory in memories] == self._starts.tolist()
        put_rows(table, sources, height, memories, own=own, rank=self._peers.group.coordinate)

    def rows_of(channel: ThreadChannel) -> PeerRows:
        asked.append(channel.coordinate)
        channels[channel.coordinate] = channel
        if channel.coordinate not in made:
            group = Group(None, channel.ranks, channel.coordinate, False)  # type: ignore[arg-type]
            peers = create_autospec(PeerMemory, instance=True, group=group, device=torch.device("cpu"))
            peers.all_reduce.side_effect = lambda x, out, way: out.copy_(channels[group.coordinate].all_reduce(x))
            made[channel.coordinate] = PeerRows(peers, "rows", lambda each: [each] * parts)
        return made[channel.coordinate]

    monkeypatch.setattr(push_rows, "mapped", mapped)
    monkeypatch.setattr(push_rows, "_ROUND_TO", 256)
    monkeypatch.setattr(PeerRows, "write", write)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ThreadChannel, "peer_rows", rows_of)
    return asked
