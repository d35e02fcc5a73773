"""One replica, as the process sees it that started it: its ranks, their connections, its jobs, and its end.

All jobs are told to the ranks at once, which serve them together. A step is told when one was heard of, so that a few
are always under way: what is told between two of them takes effect before the next one.

Everything here is called by one thread, the supervisor's, with which the ranks end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Sequence

import partitioner.errors
from partitioner.errors import CommunicationError, PartitionerError, RankLost
from runtime.launching.connection import Connection, Message, pair
from runtime.launching.jobs import Job
from runtime.launching.reserving import Reserving
from runtime.launching.serve import CONNECTION
from runtime.launching.status import ReplicaStatus
from runtime.processes.launch import GIVEN, signal_name, start_rank, write_memory
from runtime.processes.place import REPLICA, Place

__all__ = ["Replica"]

_GRACE_S = 0.5
"""How long after the first sign of a loss the others have to say what it is."""
_PATIENCE_S = 5.0
"""How long ranks have to end by themselves."""
_AHEAD = 2
"""Steps that are told before the first of them is heard of: the ranks need not wait for the next word."""


class Replica:
    """See the module's docstring. place: that of its rank 0."""

    def __init__(self, place: Place, *, timeout_s: float) -> None:
        self.place, self.timeout_s = place, timeout_s
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self.handles: list[int] = []
        """A descriptor per rank that can be read once its process has ended."""
        self.ready: dict[int, Message] = {}
        self.jobs: dict[int, Job | Reserving] = {}
        """By number, those that the ranks were told of and that are not over."""
        self.steps_ahead = 0
        """How many steps were told that were not heard of."""
        self.said: Message = {}
        """What the ranks have said last of how they are."""
        self.lost: PartitionerError | None = None
        self._files: list[int] = []
        self._numbers = itertools.count()
        self._failed: dict[int, Message] = {}
        self._failed_since: float | None = None
        self._heard: list[float | None] = []
        """When each rank last said something; None: nothing yet, while it imports what it needs."""

    @property
    def num_ranks(self) -> int:
        return self.place.mesh.world_size

    @property
    def load(self) -> int:
        return sum(job.left for job in self.jobs.values() if isinstance(job, Job))

    def status(self) -> ReplicaStatus:
        """Any thread may ask."""
        lost = None if self.lost is None else str(self.lost)
        there = sum(isinstance(job, Job) for job in list(self.jobs.values()))
        return ReplicaStatus.of(self.said, rows=there, lost=lost)

    def start(self, module: Sequence[str], given: bytes) -> None:
        first, total = self.place.replica * self.num_ranks, self.place.replicas * self.num_ranks
        store, question = (os.memfd_create(f"partitioner-{name}", os.MFD_CLOEXEC) for name in ("store", "given"))
        self._files = [store, question]
        write_memory(question, given)
        for rank in range(self.num_ranks):
            ours, theirs = pair()
            with theirs:
                process = start_rank(
                    module,
                    rank,
                    self.num_ranks,
                    store=store,
                    files={GIVEN: question, CONNECTION: theirs.fileno()},
                    variables={
                        "LOCAL_RANK": first + rank,
                        "LOCAL_WORLD_SIZE": total,
                        REPLICA: f"{self.place.replica}/{self.place.replicas}",
                    },
                )
            self.processes.append(process)
            self.handles.append(os.pidfd_open(process.pid))
            self.connections.append(Connection(ours, timeout_s=self.timeout_s))
        self._heard = [None] * self.num_ranks

    @property
    def is_ready(self) -> bool:
        return len(self.ready) == self.num_ranks

    # -- what ranks say ------------------------------------------------------------------------------------------------

    def hear(self, rank: int) -> bool:
        """Takes what a rank has said; False: it will say no more."""
        messages, is_open = self.connections[rank].received()
        self._heard[rank] = time.monotonic()
        for message in messages:
            self._take(rank, message)
        return is_open

    def _take(self, rank: int, message: Message) -> None:
        kind = message["kind"]
        if kind == "ready":
            self.ready[rank] = message
        elif kind == "failed":
            self._failed[rank] = message
            self.suspect()
        elif kind == "stepped":
            self._step(message)
        elif kind == "room":
            job = self.jobs.pop(message["job"], None)
            if isinstance(job, Reserving):
                job.take(message)
        elif kind == "refused":
            self._end(message["job"], _error(message))
        self.go_on()

    def _step(self, message: Message) -> None:
        self.steps_ahead -= 1
        self.said = message["status"]
        for number, token, logprob, is_over, top in message["told"]:
            job = self.jobs.get(number)
            if not isinstance(job, Job):
                continue  # it was cancelled while this step ran
            job.take(token, logprob, top)
            if is_over:
                self._end(number)
        for number, kind, text in message["refused"]:
            self._end(number, _error({"type": kind, "text": text}))

    def _end(self, number: int, failure: PartitionerError | None = None) -> None:
        job = self.jobs.pop(number, None)
        if job is not None:
            job.end(failure)

    # -- what they are told --------------------------------------------------------------------------------------------

    def add(self, job: Job | Reserving) -> None:
        number = next(self._numbers)
        self.jobs[number] = job
        self._tell({"kind": "add" if isinstance(job, Job) else "reserve", "job": number, **job.said()})

    def go_on(self) -> None:
        """Drops what nobody wants any more, and tells steps as long as there is something to do."""
        if self.lost is not None:
            return
        for number, job in list(self.jobs.items()):
            if isinstance(job, Job) and (job.future.cancelled() or not job.is_wanted):
                del self.jobs[number]
                self._tell({"kind": "cancel", "job": number})
                job.end()
        while self.steps_ahead < _AHEAD and any(isinstance(job, Job) for job in self.jobs.values()):
            self.steps_ahead += 1
            self._tell({"kind": "step"})

    def _tell(self, message: Message) -> None:
        for connection in self.connections:
            try:
                connection.send(message)
            except OSError:  # gone, or it does not read
                self.suspect()

    # -- its end -------------------------------------------------------------------------------------------------------

    def suspect(self) -> None:
        """Something is wrong; what, is concluded after a moment."""
        self._failed_since = self._failed_since or time.monotonic()

    def is_lost(self) -> bool:
        """Whether it is certain by now; `conclude` says what it is."""
        now = time.monotonic()
        if any(now - heard > self.timeout_s for heard in self._heard if heard is not None):
            return True
        if self._failed_since is None:
            return False
        ended = [process.poll() for process in self.processes]
        own = any(not _is_consequence(message) for message in self._failed.values())
        return own or any(code is not None and code < 0 for code in ended) or now - self._failed_since > _GRACE_S

    def conclude(self) -> PartitionerError:
        """Ends what is left of it, and all its jobs with the reason."""
        self.lost = self._reason()
        for job in self.jobs.values():
            job.end(_copy(self.lost))
        self.jobs.clear()
        self.end(patient=False)
        return self.lost

    def _reason(self) -> PartitionerError:
        name = self.place.name
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if code is not None and code < 0:
                return RankLost(f"{name(rank)} was ended by {signal_name(-code)} (process {process.pid})")
        for rank, message in sorted(self._failed.items()):
            if not _is_consequence(message):
                error = _error(message)
                if not self.is_ready and not isinstance(error, RankLost):
                    return error
                return RankLost(f"{name(rank)} failed: {message['type']}: {message['text']}")
        for message in self._failed.values():
            return _error(message)
        now = time.monotonic()
        for rank, heard in enumerate(self._heard):
            if heard is not None and now - heard > self.timeout_s:
                return RankLost(f"{name(rank)} gave no sign of life for {self.timeout_s:g} s: its process is stopped")
        codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
        rank = next((rank for rank, code in codes.items() if code is not None), 0)
        return RankLost(f"{name(rank)} ended with exit code {codes[rank]} (its output is above)")

    def end(self, *, patient: bool = True) -> None:
        """Ends all its ranks, and waits for that."""
        for connection in self.connections:
            connection.close()  # what waits for a word ends
        if patient and self.is_ready and not self.steps_ahead:
            deadline = time.monotonic() + _PATIENCE_S
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for file in (*self.handles, *self._files):
            os.close(file)
        self.handles, self._files, self.connections = [], [], []


def _is_consequence(message: Message) -> bool:
    """Whether it is what others did that ended this rank."""
    return isinstance(_error(message), CommunicationError)


def _error(message: Message) -> PartitionerError:
    """What a rank raised; RankLost where that is no exception of ours."""
    kind = vars(partitioner.errors).get(message["type"])
    if isinstance(kind, type) and issubclass(kind, PartitionerError):
        return kind(message["text"])
    return PartitionerError(f"{message['type']}: {message['text']}")


def _copy(error: PartitionerError) -> PartitionerError:
    """One exception raised in several threads would collect all their tracebacks."""
    return type(error)(*error.args)
