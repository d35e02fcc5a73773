"""Ranks of one process that write rows into each other's memory: what `push_rows_kernel` does, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.communication.peer_memory.rows.copy_engines import lines_of
from runtime.communication.thread_communicator import ThreadChannel
from runtime.ops.rows.row_moves import ALIGNED, Move


class WrittenRows:
    """One rank's end; `memories`: of all ranks."""

    def __init__(self, channel: ThreadChannel, memories: list[Tensor]) -> None:
        self._channel, self.memories = channel, memories

    @property
    def memory(self) -> Tensor:
        return self.memories[self._channel.coordinate]

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert not source.numel() or lines_of(target, source), "no lines that a copy engine takes"
        target.copy_(source)

    @property
    def second(self) -> int:
        return self.memory.numel() // 2

    def require(self, sizes: tuple[int, int]) -> bool:
        return max(sizes) <= self.second

    def table(self, key: Hashable, moves: Callable[[], Sequence[Move]]) -> Tensor:
        return torch.tensor([each.fields() for each in moves()], dtype=torch.int64).reshape(-1, 13)

    def begin(self, run: Callable[[], None]) -> None:
        run()

    def finish(self, end: None) -> None:
        pass

    def write(
        self,
        table: Tensor,
        sources: Sequence[Tensor],
        height: int,
        *,
        own: Tensor | None = None,
        programs: int | None = None,
    ) -> None:
        put_rows(table, sources, height, self.memories, own=own, rank=self._channel.coordinate)

    def meet(self) -> None:
        self._channel.all_reduce(torch.zeros(1))


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


def writing(monkeypatch: Any, parts: int, *, num_bytes: int = 1 << 20) -> list[int]:
    """Makes channels of threads write so; counts who has asked for it."""
    memories, asked = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(parts)], list[int]()

    def peer_rows(channel: ThreadChannel) -> WrittenRows:
        asked.append(channel.coordinate)
        return WrittenRows(channel, memories)

    monkeypatch.setattr(ThreadChannel, "peer_rows", peer_rows)
    return asked
