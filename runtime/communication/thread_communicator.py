"""All ranks in one process, one thread each, meeting in memory: the communicator of the simulator.

Nothing is buffered: a rank waits until all that take part in a meeting have come to it, also the two of a send and
receive. So what runs here needs no buffers anywhere. What is begun has met and been copied: finishing it is local, and
any number may be unfinished.

Every meeting is checked. All of these raise on every rank, at once, whatever other ranks are doing:

    ranks that disagree on what they do together              RankMismatch, as soon as the second of them has come
    ranks that wait for each other, or for one that has ended RankMismatch, also while others run
    a rank that failed while others wait                      RankLost

Sums are taken in order of coordinate, so that a run is repeatable bit by bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import CommunicationError, RankLost, RankMismatch
from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import Channel, Handle, piece_sizes, require_counts, require_piece
from runtime.communication.communicator import Communicator, require_axes
from runtime.communication.group_collectives import sum_in_order, to_pieces
from runtime.communication.matching_calls import Call, check_agreement, check_counts
from runtime.communication.traceable import OpaqueChannel
from runtime.ops.communicating import Axes, Kind, axes_text

__all__ = ["ThreadGroup"]


@dataclass
class _Meeting:
    members: tuple[int, ...]
    brought: dict[int, tuple[Call, Tensor]] = field(default_factory=dict)
    complete: bool = False

    @property
    def calls(self) -> list[Call]:
        return [self.brought[rank][0] for rank in self.members if rank in self.brought]

    @property
    def absent(self) -> list[int]:
        return [rank for rank in self.members if rank not in self.brought]


class ThreadGroup:
    """Where the ranks of one mesh meet; `communicator(rank)` gives each its end."""

    def __init__(self, mesh: Mesh, *, timeout_s: float = 60.0) -> None:
        self.mesh = mesh
        self.timeout_s = timeout_s
        self._changed = threading.Condition()
        self._open: dict[frozenset[int], _Meeting] = {}
        """By those that take part. One each is enough: no rank is at two meetings at a time."""
        self._waiting: dict[int, tuple[Call, _Meeting]] = {}
        self._ended: set[int] = set()
        self._failure: CommunicationError | None = None

    def communicator(self, rank: int) -> ThreadCommunicator:
        return ThreadCommunicator(self, rank)

    def reset(self) -> None:
        """Forget the last run; call while no rank runs."""
        self._open, self._waiting, self._ended, self._failure = {}, {}, set(), None

    def end(self, rank: int) -> None:
        """`rank` has no more to do in this run: whoever still waits for it never will be served."""
        with self._changed:
            self._ended.add(rank)
            self._fail_if_stuck()

    def abort(self, rank: int, error: BaseException) -> None:
        with self._changed:
            self._fail(RankLost(f"rank {rank} failed, {self._where()}: {type(error).__name__}: {error}"))

    def exchange(self, members: tuple[int, ...], call: Call, x: Tensor) -> list[tuple[Call, Tensor]]:
        """Bring `x` to the meeting of `members` and take what every rank brought, in their order."""
        with self._changed:
            self._raise_failure()
            meeting = self._open.setdefault(frozenset(members), _Meeting(members))
            meeting.brought[call.rank] = (call, x)
            try:
                check_agreement(meeting.calls)
                if not meeting.absent:
                    check_counts(meeting.calls)
            except RankMismatch as mismatch:
                self._fail(mismatch)
                raise
            if meeting.absent:
                self._waiting[call.rank] = (call, meeting)
                self._fail_if_stuck()
                self._wait(meeting, call)
            else:
                del self._open[frozenset(members)]
                for rank in members:
                    self._waiting.pop(rank, None)
                meeting.complete = True
                self._changed.notify_all()
        return [meeting.brought[rank] for rank in members]

    def _wait(self, meeting: _Meeting, call: Call) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not meeting.complete:
            self._raise_failure()
            if not self._changed.wait(deadline - time.monotonic()) and not meeting.complete:
                absent = ", ".join(map(str, meeting.absent))
                self._fail(RankLost(f"no answer from rank {absent} within {self.timeout_s:g} s, awaited by\n  {call}"))

    def _fail_if_stuck(self) -> None:
        """A rank can go on if it runs, or waits for ranks only that can go on; the others never will."""
        can_go_on = {rank for rank in range(self.mesh.world_size) if rank not in self._ended | self._waiting.keys()}
        stuck = dict(sorted(self._waiting.items()))
        while freed := [rank for rank, (_, meeting) in stuck.items() if can_go_on.issuperset(meeting.absent)]:
            can_go_on.update(freed)
            for rank in freed:
                del stuck[rank]
        if stuck:
            awaited = {rank for _, meeting in stuck.values() for rank in meeting.absent}
            lines = [str(call) for call, _ in stuck.values()]
            lines += [f"rank {rank}: has ended" for rank in sorted(self._ended & awaited)]
            self._fail(RankMismatch("the ranks wait for each other and none can go on:\n  " + "\n  ".join(lines)))

    def _fail(self, error: CommunicationError) -> None:
        # the first failure is the cause, those after it are consequences
        self._failure = self._failure or error
        self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            # one exception object in several threads would collect all their tracebacks
            raise type(self._failure)(*self._failure.args)

    def _where(self) -> str:
        waits = "; ".join(str(call) for _, (call, _) in sorted(self._waiting.items()))
        return f"while others waited ({waits})" if waits else "while no other rank waited"


class ThreadCommunicator(Communicator):
    """One rank's end of a ThreadGroup."""

    def __init__(self, thread_group: ThreadGroup, rank: int) -> None:
        self.mesh = thread_group.mesh
        self.rank = rank
        self.can_be_captured = self.mesh.world_size == 1  # threads meet on the host
        self._thread_group = thread_group
        self._order = torch.zeros((), device="cpu")

    def channel(self, axes: Axes, *, node: str) -> Channel:
        named = require_axes(axes, node)
        return ThreadChannel(self._thread_group, named, self.mesh.group(named, self.rank), self.rank, node=node)

    def traceable_channel(self, axes: Axes, *, node: str) -> Channel:
        return OpaqueChannel(self.channel(axes, node=node), self._order, device=torch.device("cpu"))

    def begin_run(self, *, new_shapes: bool) -> None:
        """Comparing costs next to nothing in memory: it is always on."""

    def explained(self, error: BaseException) -> BaseException:
        return error

    def abort(self, error: BaseException) -> None:
        self._thread_group.abort(self.rank, error)

    def barrier(self) -> None:
        everyone = tuple(range(self.mesh.world_size))
        self._thread_group.exchange(everyone, Call(self.rank, "", "barrier", "all"), torch.empty(0, device="cpu"))

    def close(self) -> None:
        self._thread_group.end(self.rank)


class ThreadChannel(Channel):
    """Each rank computes its own result from what all brought: nothing is shared that someone might write to."""

    def __init__(
        self, thread_group: ThreadGroup, axes: tuple[str, ...], ranks: tuple[int, ...], rank: int, *, node: str
    ) -> None:
        super().__init__(axes, ranks, rank, node=node)
        self._thread_group = thread_group

    def prepare(self, kind: Kind, *, overwrite: bool = False, **options: Any) -> Callable[..., Any]:
        call = Call(self.rank, self.node, kind, axes_text(self.axes), options)
        found: Callable[..., Any] = _PREPARE[kind](self, call, **options)
        return found

    def _meet(self, call: Call, x: Tensor) -> list[Tensor]:
        # a copy: the others may read it when this rank has gone on, and writes to that memory again
        return [brought for _, brought in self._thread_group.exchange(self.ranks, call, x.clone())]

    def _all_reduce(self, call: Call) -> Callable[[Tensor], Tensor]:
        return lambda x: sum_in_order(self._meet(call.on(x), x))

    def _all_gather(self, call: Call, *, dim: int, sizes: object = None) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            require_piece(x, call.options, self.coordinate, node=self.node, rank=self.rank)
            return torch.cat(self._meet(call.on(x), x), dim=dim)

        return run

    def _reduce_scatter(
        self, call: Call, *, dim: int, sizes: Sequence[int] | None = None
    ) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            found = piece_sizes(x, dim, sizes, self)
            brought = self._meet(call.on(x), x)
            return sum_in_order([to_pieces(each, dim, found, len(found))[self.coordinate] for each in brought])

        return run

    def _all_to_all(
        self, call: Call, *, sizes_from: str | None = None
    ) -> Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]:
        call = replace(call, options={}, sizes_from=sizes_from)

        def run(x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
            require_counts(x, send_counts, receive_counts, self)
            counts = (tuple(send_counts), tuple(receive_counts))
            brought = self._thread_group.exchange(self.ranks, replace(call.on(x), counts=counts), x)
            return torch.cat([self._rows_for_this(other, rows) for other, rows in brought])

        return run

    def _rows_for_this(self, sender: Call, rows: Tensor) -> Tensor:
        assert sender.counts is not None
        return torch.split(rows, list(sender.counts[0]))[self.coordinate]

    def _permute(self, call: Call, *, shift: int) -> Callable[[Tensor], Handle]:
        from_ = (self.coordinate - shift) % len(self.ranks)
        # a copy, which belongs to the one rank that gets it
        return lambda x: Handle.done(self._meet(call.on(x), x.clone())[from_])

    def _send(self, call: Call, *, to: int) -> Callable[[Tensor], Handle]:
        call, pair = self._to_peer(call, to)

        def begin(x: Tensor) -> Handle:
            self._thread_group.exchange(pair, call.on(x), x.clone())
            return Handle.done(x)

        return begin

    def _receive(self, call: Call, *, from_: int) -> Callable[[Sequence[int], torch.dtype], Handle]:
        call, pair = self._to_peer(call, from_)
        sender = pair.index(self.peer(from_))

        def begin(shape: Sequence[int], dtype: torch.dtype) -> Handle:
            brought = self._thread_group.exchange(pair, call.of(shape, dtype), torch.empty(0, device="cpu"))
            return Handle.done(brought[sender][1])

        return begin

    def _to_peer(self, call: Call, coordinate: int) -> tuple[Call, tuple[int, ...]]:
        peer = self.peer(coordinate)
        return replace(call, options={}, peer=peer), tuple(sorted((self.rank, peer)))


_PREPARE: dict[Kind, Callable[..., Callable[..., Any]]] = {
    "all_reduce": ThreadChannel._all_reduce,
    "all_gather": ThreadChannel._all_gather,
    "reduce_scatter": ThreadChannel._reduce_scatter,
    "all_to_all": ThreadChannel._all_to_all,
    "permute": ThreadChannel._permute,
    "send": ThreadChannel._send,
    "receive": ThreadChannel._receive,
}
