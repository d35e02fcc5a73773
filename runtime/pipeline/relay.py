"""Decode steps over stages whose devices hand on by themselves: the host queues turns ahead, and reads tokens later.

    turn t on a stage    inbox of group t % n  ->  the group's step, from fixed memory  ->  outbox
    said(t)              what the group had been given when its turn t began, on the host

A turn's message comes beside what the stage computes, and is handed on while the stage computes the next turn's. A
receive is begun behind the turn that is queued before it: a GPU's waits in a kernel, which takes room from those of a
turn, and what is small has come by then, as NCCL buffers it. An inbox is written to when the group's turn before has
read it, an outbox when what was in it is gone. Nothing waits for the host: it may queue turns as far ahead as it likes,
as long as all stages queue the same. The order in which a stage queues what it sends, receives and computes would do
without buffers, and on one stream (`schedule.relay`): so neither NCCL's one stream for a group nor streams that share a
queue of the device can block it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from runtime.communication.channels import Channel, Handle
from runtime.communication.communicator import Communicator
from runtime.pipeline.message import Box
from runtime.pipeline.schedule import Head, Receive, Run, Send, in_turn
from runtime.pipeline.streams import Event, Streams
from runtime.program.rank_program import Stage

__all__ = ["Member", "Relay"]


class Member(Protocol):
    """A group of rows: its memory, and its step, which reads `inbox` and writes `outbox`.

    choose: where all stages share out the head, what they choose when the last one has run the group, into `inbox`.
    """

    @property
    def inbox(self) -> Box: ...

    @property
    def outbox(self) -> Box: ...

    def turn(self) -> None: ...

    def choose_by_all(self) -> None: ...


class Relay:
    """One rank's part; members: by group, None where it has no rows. At least as many as there are stages."""

    def __init__(
        self,
        stage: Stage,
        members: Sequence[Member | None],
        channel: Channel,
        communicator: Communicator,
        streams: Streams,
        *,
        shares_head: bool,
    ) -> None:
        assert len(members) >= stage.count
        self._shares_head = shares_head
        self._stage, self._members = stage, members
        self._channel, self._communicator, self._streams = channel, communicator, streams
        self._turn = 0
        self._awaited = False
        """Whether the other stages count on another turn of this one."""
        self._arriving: dict[int, Handle] = {}
        self._leaving: dict[int, Handle] = {}
        """By group."""
        self._read: list[Event] = [streams.record()] * len(members)
        """By group: when its last turn has been through with its memory."""
        self._said: dict[int, tuple[Tensor, Event]] = {}
        self._queued: Event = streams.record()
        """Behind the turn that was queued last."""

    def turn(self, *, more: bool) -> None:
        """Queues the next turn. more: whether there will be another; behind the last one nothing is under way.

        All stages must queue the same turns, and say the same of them.
        """
        stage, turn = self._stage, self._turn
        if stage.index and turn == 0:
            self._receive(0)
        self._turn, self._awaited = turn + 1, False  # where this fails, nothing is to be ended
        groups, shares_head = len(self._members), self._shares_head
        for action in in_turn(stage.index, stage.count, groups, turn, more=more, shares_head=shares_head):
            match action:
                case Run(number):
                    self._run(number)
                case Receive(number):
                    self._receive(number)
                case Send(number):
                    self._send(number)
                case Head(number):
                    self._choose(number)
        if not more:
            self._finish()
        self._awaited = more

    def leave(self) -> None:
        """Ends it where others may count on another turn, which is run for nothing."""
        if self._awaited:
            self.turn(more=False)

    def said(self, turn: int) -> Tensor:
        """[2, rows] float64 on the host: tokens and their logits; of a turn in the second round or later, once."""
        said, event = self._said.pop(turn)
        if event is not None:
            event.synchronize()
        return said

    def _run(self, turn: int) -> None:
        group, streams = turn % len(self._members), self._streams
        member = self._members[group]
        if member is None:
            return
        arriving = self._arriving.pop(turn, None)
        with streams.incoming():
            streams.wait(self._read[group])
            if arriving is not None:
                member.inbox.packed.copy_(arriving.finish())
            arrived = streams.record()
            if turn >= len(self._members):
                said = streams.to_host(member.inbox.said)
                self._said[turn] = said, streams.record()
        streams.wait(arrived)
        leaving = self._leaving.pop(group, None)
        if leaving is not None:
            leaving.finish()
        self._communicator.begin_run(new_shapes=False)
        member.turn()
        self._read[group] = self._queued = streams.record()

    def _choose(self, turn: int) -> None:
        group = turn % len(self._members)
        member = self._members[group]
        if member is not None:
            if turn in self._said:
                self._streams.wait(self._said[turn][1])
            self._communicator.begin_run(new_shapes=False)
            member.choose_by_all()
            self._read[group] = self._streams.record()

    def _receive(self, number: int) -> None:
        member = self._members[number % len(self._members)]
        if member is None:
            return
        before = (self._stage.index - 1) % self._stage.count
        packed = member.inbox.packed
        self._compare(number)
        # the memory that it comes to is this stream's, which is used again behind a turn that has waited for its copy
        with self._streams.receiving():
            self._streams.wait(self._queued)
            self._arriving[number] = self._channel.receive_begin(packed.shape, packed.dtype, before)

    def _send(self, number: int) -> None:
        group = number % len(self._members)
        member = self._members[group]
        if member is None:
            return
        self._compare(number)
        with self._streams.outgoing():
            self._streams.wait(self._read[group])
            after = (self._stage.index + 1) % self._stage.count
            self._leaving[group] = self._channel.send_begin(member.outbox.packed, after)

    def _finish(self) -> None:
        with self._streams.incoming():
            for handle in self._arriving.values():
                handle.finish()
        for handle in self._leaving.values():
            handle.finish()
        self._arriving.clear()
        self._leaving.clear()

    def _compare(self, number: int) -> None:
        """In the first rounds, ranks make sure that they mean the same."""
        self._communicator.begin_run(new_shapes=number < 2 * len(self._members))
