"""All ranks in one process, one thread each, meeting in memory: the communicator of the simulator.

Every meeting is checked: ranks that disagree, ranks that wait for each other in different groups, a rank that ended or
failed while others wait; all of these raise at once, on every rank, rather than hang. Sums are taken in order of
coordinate, so that a run is repeatable bit by bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import CommunicationError, RankLost, RankMismatch
from partitioner.sharding.mesh import Mesh
from runtime.communication.communicator import require_axis, require_op, require_piece
from runtime.communication.matching_calls import Call, check_agreement
from runtime.communication.traceable import opaque
from runtime.ops.collectives import all_gather, all_reduce

__all__ = ["ThreadGroup"]


@dataclass
class _Meeting:
    brought: dict[int, tuple[Call, Tensor]] = field(default_factory=dict)
    complete: bool = False


class ThreadGroup:
    """Where the ranks of one mesh meet; `communicator(rank)` gives each its end."""

    def __init__(self, mesh: Mesh, *, timeout_s: float = 60.0) -> None:
        self.mesh = mesh
        self.timeout_s = timeout_s
        self._changed = threading.Condition()
        self._open: dict[tuple[int, ...], _Meeting] = {}
        self._waiting: dict[int, Call] = {}
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

    def exchange(self, group: tuple[int, ...], call: Call, x: Tensor) -> list[Tensor]:
        """Bring `x` to the meeting of `group` and take what every rank brought, in order of the group."""
        with self._changed:
            self._raise_failure()
            meeting = self._open.setdefault(group, _Meeting())
            meeting.brought[call.rank] = (call, x)
            if len(meeting.brought) == len(group):
                del self._open[group]
                self._complete(group, meeting)
            else:
                self._waiting[call.rank] = call
                self._fail_if_stuck()
                self._wait(group, meeting, call)
        return [meeting.brought[rank][1] for rank in group]

    def _complete(self, group: tuple[int, ...], meeting: _Meeting) -> None:
        try:
            check_agreement([meeting.brought[rank][0] for rank in group])
        except RankMismatch as mismatch:
            self._fail(mismatch)
            raise
        for rank in group:
            self._waiting.pop(rank, None)
        meeting.complete = True
        self._changed.notify_all()

    def _wait(self, group: tuple[int, ...], meeting: _Meeting, call: Call) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not meeting.complete:
            self._raise_failure()
            if not self._changed.wait(deadline - time.monotonic()) and not meeting.complete:
                absent = ", ".join(str(rank) for rank in group if rank not in meeting.brought)
                self._fail(RankLost(f"no answer from rank {absent} within {self.timeout_s:g} s, awaited by\n  {call}"))

    def _fail_if_stuck(self) -> None:
        """With zero buffering, once every rank waits or has ended nothing can move any more."""
        if self._waiting and len(self._waiting) + len(self._ended) == self.mesh.world_size:
            lines = [str(call) for _, call in sorted(self._waiting.items())]
            lines += [f"rank {rank}: has ended" for rank in sorted(self._ended)]
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
        waits = "; ".join(str(call) for _, call in sorted(self._waiting.items()))
        return f"while others waited ({waits})" if waits else "while no other rank waited"


class ThreadCommunicator:
    """One rank's end of a ThreadGroup."""

    def __init__(self, thread_group: ThreadGroup, rank: int) -> None:
        self.mesh = thread_group.mesh
        self.rank = rank
        self._thread_group = thread_group
        self._order = torch.zeros(())

    def bind(
        self,
        op: Callable[..., Tensor],
        axis: str,
        *,
        node: str,
        options: dict[str, Any],
        overwrite: bool = False,
    ) -> Callable[[Tensor], Tensor]:
        finish: Callable[..., Tensor] = require_op(op, _FINISH, node)
        require_axis(axis, node)
        group = self.mesh.group((axis,), self.rank)
        coordinate = group.index(self.rank)
        call = Call(self.rank, node, op.__name__, axis, options)
        meet = self._thread_group.exchange

        def collective(x: Tensor) -> Tensor:
            require_piece(x, options, coordinate, node=node, rank=self.rank)
            return finish(meet(group, call.on(x), x), **options)

        return collective

    def bind_traceable(
        self, op: Callable[..., Tensor], axis: str, *, node: str, options: dict[str, Any]
    ) -> Callable[[Tensor], Tensor]:
        run = self.bind(op, axis, node=node, options=options)
        return opaque(op, run, self._order, self.mesh.size(axis), **options)

    def begin_run(self, *, new_shapes: bool) -> None:
        """Comparing costs next to nothing in memory: it is always on."""

    def explained(self, error: BaseException) -> BaseException:
        return error

    def abort(self, error: BaseException) -> None:
        self._thread_group.abort(self.rank, error)

    def barrier(self) -> None:
        everyone = tuple(range(self.mesh.world_size))
        self._thread_group.exchange(everyone, Call(self.rank, "", "barrier", "all"), torch.empty(0))

    def close(self) -> None:
        self._thread_group.end(self.rank)


def _sum(pieces: list[Tensor]) -> Tensor:
    total = pieces[0].clone()
    for piece in pieces[1:]:
        total += piece
    return total


def _gather(pieces: list[Tensor], *, dim: int, sizes: object = None) -> Tensor:
    return torch.cat(pieces, dim=dim)


# each rank computes its own result from what all brought: nothing is shared that someone might write to
_FINISH: dict[Callable[..., Tensor], Callable[..., Tensor]] = {all_reduce: _sum, all_gather: _gather}
