"""The thread that starts replicas, hears what their ranks say, hands out jobs, and ends them all.

The kernel ends the ranks with this thread, so it lives as long as they do. What it is asked to do comes over a queue.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections.abc import Callable, Sequence

from partitioner.errors import CommunicationError, PartitionerError, RankLost
from runtime.engine.replicas import deal, work_of
from runtime.launching.jobs import Call, Job
from runtime.launching.replica import Replica
from runtime.launching.reserving import Reserving

__all__ = ["Supervisor"]

_log = logging.getLogger("partitioner")
_LOOK_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
"""Before a lost replica is started again; twice as long after each time that it was lost before it was ready."""


class Supervisor:
    """`start` returns once all replicas are ready; `close` once none of their processes is left.

    restarts: a replica that is lost is started again, and takes the place of the lost one once it is ready.
    """

    def __init__(self, replicas: Sequence[Replica], *, restarts: bool) -> None:
        self._restarts = restarts
        self._due: dict[int, float] = {}
        """By number, when a lost replica is to be started again."""
        self._pauses: dict[int, float] = {}
        self._starting: dict[int, tuple[Replica, float]] = {}
        """Those that are not ready yet, with the time until when they must be."""
        self.replicas = list(replicas)
        self._asked: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._wakes, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._changed = threading.Condition()
        self._closing = self._is_over = False
        self._broken: BaseException | None = None
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None

    def start(self, module: Sequence[str], given: bytes, *, timeout_s: float) -> None:
        """Raises what kept a replica from starting, after all have been ended."""
        self._module, self._given, self._start_s = module, given, timeout_s
        self._thread = threading.Thread(target=self._run, args=(module, given), daemon=True, name="replicas")
        self._thread.start()
        try:
            with self._changed:
                came = self._changed.wait_for(
                    lambda: self._broken or all(each.is_ready or each.lost for each in self.replicas), timeout_s
                )
            failure = self._broken or next((each.lost for each in self.replicas if each.lost is not None), None)
            if failure is None and not came:
                late = [each.place.replica for each in self.replicas if not each.is_ready]
                failure = RankLost(f"replicas {', '.join(map(str, late))} were not ready within {timeout_s:g} s")
            if failure is not None:
                raise failure
        except BaseException:
            self.close()
            raise

    def submit(self, call: Call) -> None:
        """Deals the rows to replicas, as they are loaded now."""

        def hand_out() -> None:
            alive = self._alive()
            call.jobs = jobs = [Job(call, row) for row in range(len(call.request.prompts))]
            if not alive:
                for job in jobs:
                    job.end(self._nobody())
                return
            dealt = deal(work_of(call.request), replicas=len(alive), loads=[each.load for each in alive])
            for replica, rows in zip(alive, dealt, strict=True):
                for row in rows:
                    replica.add(jobs[row])
                replica.go_on()

        self._ask(hand_out)

    def reserve(self, jobs: Sequence[Reserving]) -> None:
        """One for each replica that is left."""

        def hand_out() -> None:
            for replica, job in zip(self.replicas, jobs, strict=True):
                if replica.lost is not None:
                    job.end(self._nobody())
                    continue
                replica.add(job)

        self._ask(hand_out)

    def look(self) -> None:
        """Somebody has lost interest in a job."""

        def look() -> None:
            for replica in self._alive():
                replica.go_on()

        self._ask(look)

    def close(self) -> None:
        """May be called again."""
        self._closing = True
        self._awake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _ask(self, work: Callable[[], None]) -> None:
        """Has it done by the supervisor's thread, and waits until it is."""
        done = threading.Event()

        def do() -> None:
            work()
            done.set()

        with self._lock:
            if self._is_over or self._closing:
                raise CommunicationError("the replicas have been ended: this is after the `with` block, or close()")
            self._asked.append(do)
        self._awake()
        while not done.wait(1.0):
            if self._is_over:
                raise CommunicationError("the replicas have been ended")

    def _awake(self) -> None:
        try:
            os.write(self._wake, b".")
        except BlockingIOError:
            pass
        except OSError:
            return

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self, module: Sequence[str], given: bytes) -> None:
        try:
            for replica in self.replicas:
                replica.start(module, given)
            self._selector.register(self._wakes, selectors.EVENT_READ)
            for replica in self.replicas:
                self._listen(replica)
            while not self._closing:
                self._turn()
        except BaseException as error:
            self._broken = error
            if self.replicas and all(each.is_ready for each in self.replicas):
                _log.exception("what watches over replicas has failed: all are ended")
        finally:
            self._end()

    def _listen(self, replica: Replica) -> None:
        for rank, (connection, handle) in enumerate(zip(replica.connections, replica.handles, strict=True)):
            self._selector.register(connection.socket, selectors.EVENT_READ, (replica, rank, True))
            self._selector.register(handle, selectors.EVENT_READ, (replica, rank, False))

    def _turn(self) -> None:
        for key, _ in self._selector.select(_LOOK_S):
            if key.data is None:
                os.read(self._wakes, 1 << 16)
                continue
            replica, rank, is_line = key.data
            if not is_line or not replica.hear(rank):
                self._selector.unregister(key.fileobj)
                replica.suspect()
        for replica in self._alive():
            if replica.is_lost():
                self._lose(replica)
        if self._restarts:
            self._start_again()
        with self._lock:
            asked, self._asked = self._asked, []
        for work in asked:
            work()
        with self._changed:
            self._changed.notify_all()

    def _start_again(self) -> None:
        """What is due; and takes in what has become ready, or is lost before that."""
        now = time.monotonic()
        for number, (replica, deadline) in list(self._starting.items()):
            if replica.is_ready:
                del self._starting[number]
                self.replicas[number] = replica
                self._pauses.pop(number, None)
                _log.warning("replica %d is back", number)
            elif replica.is_lost() or now > deadline:
                del self._starting[number]
                _log.warning("replica %d was not started again: %s", number, self._conclude(replica))
                self._plan_start(number)
        for number in [number for number, due in self._due.items() if now >= due]:
            del self._due[number]
            old = self.replicas[number]
            replica = Replica(old.place, timeout_s=old.timeout_s)
            replica.start(self._module, self._given)
            self._listen(replica)
            self._starting[number] = (replica, now + self._start_s)

    def _plan_start(self, number: int) -> None:
        pause = self._pauses.get(number, _FIRST_PAUSE_S)
        self._due[number] = time.monotonic() + pause
        self._pauses[number] = min(2 * pause, _LONGEST_PAUSE_S)

    def _conclude(self, replica: Replica) -> PartitionerError:
        for key in list(self._selector.get_map().values()):
            if key.data is not None and key.data[0] is replica:
                self._selector.unregister(key.fileobj)
        return replica.conclude()

    def _lose(self, replica: Replica) -> None:
        reason = self._conclude(replica)
        if self._restarts and replica.is_ready:
            self._plan_start(replica.place.replica)
        if len(self.replicas) > 1 and replica.is_ready:
            left = len(self._alive())
            others = f"{left} of {len(self.replicas)} replicas go on" if left else "no replica is left"
            _log.warning("replica %d is lost: %s; %s", replica.place.replica, reason, others)

    def _end(self) -> None:
        failure = CommunicationError("the replicas have been ended")
        started = time.monotonic()
        for replica in self.replicas:
            for job in replica.jobs.values():
                job.end(failure)
            # the others end meanwhile, as their connections are closed
            for connection in replica.connections:
                connection.close()
        for replica, _ in self._starting.values():
            replica.end(patient=False)
        for replica in self._alive():
            replica.end(patient=self._broken is None and time.monotonic() - started < 5)
        with self._lock:
            self._is_over = True  # who still waits for something to be done is told so
        self._selector.close()
        os.close(self._wakes)
        os.close(self._wake)
        with self._changed:
            self._changed.notify_all()

    def _alive(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.lost is None]

    def _nobody(self) -> PartitionerError:
        reasons = "; ".join(str(replica.lost) for replica in self.replicas if replica.lost is not None)
        return RankLost(f"no replica is left: {reasons}" if len(self.replicas) > 1 else reasons)
