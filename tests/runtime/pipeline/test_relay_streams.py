"""The relay on a device with several streams: no two of them touch the same memory in an order that is left open.

A fake device notes what each stream does, in order, and what it waits for. NCCL has one stream, which waits for the
one that calls it. Two accesses of one memory, one of them a write, must be ordered by what was noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from runtime.communication.channels import Handle
from runtime.pipeline.relay import Relay
from runtime.program.rank_program import Stage


@dataclass
class Device:
    """What has been queued: of each entry its stream, what it comes after besides, and what it reads and writes."""

    stream: str = "compute"
    after: list[set[int]] = field(default_factory=list)
    streams: dict[str, int] = field(default_factory=dict)
    """The latest entry of each stream."""
    touched: dict[Any, list[tuple[int, bool]]] = field(default_factory=dict)
    """By memory: entries, and whether they write."""

    def queue(self, *, reads: Any = (), writes: Any = (), after: tuple[int | None, ...] = ()) -> int:
        at = len(self.after)
        self.after.append({each for each in (*after, self.streams.get(self.stream)) if each is not None})
        self.streams[self.stream] = at
        for memory, is_write in (*((each, False) for each in reads), *((each, True) for each in writes)):
            self.touched.setdefault(memory, []).append((at, is_write))
        return at

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    # as Streams has it

    def receiving(self) -> Any:
        return self.on("receiving")

    def incoming(self) -> Any:
        return self.on("incoming")

    def outgoing(self) -> Any:
        return self.on("outgoing")

    def record(self) -> Any:
        return SimpleNamespace(at=self.streams.get(self.stream), synchronize=lambda: None)

    def wait(self, event: Any) -> None:
        self.queue(after=(event.at,))

    def to_host(self, memory: Memory) -> Any:
        self.queue(reads=[memory.name])
        return memory.name

    # as a channel over NCCL has it

    def receive_begin(self, shape: Any, dtype: Any, from_: int) -> Handle:
        asked, landing = self.streams.get(self.stream), object()
        with self.on("nccl"):
            done = self.queue(writes=[landing], after=(asked,))
        return self._finishing(done, landing)

    def send_begin(self, memory: Memory, to: int) -> Handle:
        asked = self.streams.get(self.stream)
        with self.on("nccl"):
            done = self.queue(reads=[memory.name], after=(asked,))
        return self._finishing(done, memory)

    def _finishing(self, done: int, result: Any) -> Handle:
        def finish() -> Any:
            self.queue(after=(done,))
            return result

        return Handle(finish)

    def races(self) -> list[Any]:
        """Memory that two entries touch in no order."""
        before: list[set[int]] = []
        for earlier in self.after:
            before.append(earlier.union(*(before[each] for each in earlier)))
        return [
            memory
            for memory, touches in self.touched.items()
            for (one, writes), (other, also) in combinations(touches, 2)
            if (writes or also) and one != other and one not in before[other]
        ]


@dataclass
class Memory:
    device: Device
    name: Any
    shape = (8,)
    dtype = torch.uint8

    def copy_(self, landing: Any) -> None:
        self.device.queue(reads=[landing], writes=[self.name])


class Group:
    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number
        taken, made = Memory(device, ("inbox", number)), Memory(device, ("outbox", number))
        self.inbox: Any = SimpleNamespace(packed=taken, said=taken)
        self.outbox: Any = SimpleNamespace(packed=made, said=made)

    def turn(self) -> None:
        self.device.queue(reads=[("inbox", self.number)], writes=[("outbox", self.number)])

    def choose_by_all(self) -> None:
        self.device.queue(writes=[("inbox", self.number)])


def races(stage: int, stages: int, groups: int, *, shares_head: bool, turns: int = 14) -> list[Any]:
    device = Device()
    members = [Group(device, number) if number != 1 or groups == 2 else None for number in range(groups)]
    communicator: Any = mock.Mock()
    channel: Any = device
    relay = Relay(Stage(stage, stages), members, channel, communicator, channel, shares_head=shares_head)
    for turn in range(turns):
        relay.turn(more=turn + 1 < turns)
    assert device.touched.keys() >= {("inbox", 0), ("outbox", 0)}
    return device.races()


CASES = [(stage, stages, groups) for stages in (2, 3) for stage in range(stages) for groups in (stages, stages + 1, 5)]


@pytest.mark.parametrize("shares_head", [False, True])
@pytest.mark.parametrize(("stage", "stages", "groups"), CASES)
def test_every_memory_is_used_in_one_order(stage: int, stages: int, groups: int, shares_head: bool) -> None:
    assert not races(stage, stages, groups, shares_head=shares_head)


def test_a_wait_that_is_left_out_is_a_race() -> None:
    """The negative control: each wait of the relay in turn."""
    wait = Device.wait
    for stream in ("incoming", "outgoing", "compute"):

        def but_one(device: Device, event: Any, stream: str = stream) -> None:
            if device.stream != stream:
                wait(device, event)

        with mock.patch.object(Device, "wait", but_one):
            cases = [(stage, shares_head) for stage in (0, 1) for shares_head in (False, True)]
            assert any(races(stage, 2, 3, shares_head=shares_head) for stage, shares_head in cases), stream

    class Forgetful(Device):
        """One that does not wait for what is to leave."""

        def _finishing(self, done: int, result: Any) -> Handle:
            return Handle(lambda: result) if isinstance(result, Memory) else super()._finishing(done, result)

    with mock.patch(f"{__name__}.Device", Forgetful):
        assert races(0, 2, 3, shares_head=True)
