"""Ends a process whose GPU waits for a rank that is lost, and says which.

NCCL's kernels wait on the device: the host, waiting for the device, can be reached by no exception, and what a kernel
that is aborted leaves behind would be taken for results. So this thread ends the process, as NCCL's own watchdog does
once its timeout has passed; but within a second, with the lost rank's name, and only while the device is busy. A host
that is not waiting learns of the loss at its next collective.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch

from partitioner.errors import RankLost
from runtime.processes.heartbeat import Heartbeat

__all__ = ["DeviceWatch", "end_quickly"]

_POLL_S = 0.05
_GLANCE_S = 0.005
"""For so long nobody looks again whether all are there."""
_PATIENCE_S = 0.4
"""A device that is busy for so long after a rank was lost waits for it."""


@functools.cache
def end_quickly() -> None:
    """Lets a process that an uncaught RankLost ends be gone at once, and one that NCCL's watchdog ends.

    To clear away all that CUDA and NCCL hold, among it kernels that wait for the lost rank, takes seconds. The watchdog
    would wait a minute for records that nobody asked for.
    """
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "25")  # it waits four times as long, dump or none
    atexit.register(_end_if_lost)


def _end_if_lost() -> None:
    # what an uncaught error leaves; its traceback has been printed by now. At a prompt it ended no process
    if isinstance(getattr(sys, "last_value", None), RankLost) and not hasattr(sys, "ps1"):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # it is none, nobody reads it, it is closed
                stream.flush()
        os._exit(1)


class DeviceWatch:
    """A thread that runs until `close`. `late`: each tells the ranks that kernels await beyond the timeout."""

    def __init__(
        self,
        device: torch.device,
        heartbeat: Heartbeat,
        timeout_s: float,
        *,
        late: Sequence[Callable[[], list[int]]],
    ) -> None:
        self._device, self._heartbeat, self._timeout_s, self._late = device, heartbeat, timeout_s, late
        self._well_until = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch the device")
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def cause(self) -> str | None:
        """Which rank is lost, and how; None: none is, or none was a moment ago."""
        now = time.monotonic()
        if now < self._well_until:  # before every collective: what has just been looked at costs nothing
            return None
        found = self._found_cause()
        if found is None:
            self._well_until = now + _GLANCE_S
        return found

    def _found_cause(self) -> str | None:
        names = self._heartbeat.names
        if lost := self._heartbeat.lost():
            return "; ".join(f"{names([rank])} {how}" for rank, how in lost.items())
        others = (rank for rank in range(self._heartbeat.num_ranks) if rank != self._heartbeat.rank)
        silent = [rank for rank in others if self._heartbeat.silent_s(rank) > self._timeout_s]
        if silent:
            within = f"for {self._timeout_s:g} s"
            return f"{names(silent)} gave no sign of life {within}: stopped, or its host cannot be reached"
        for each in self._late:
            if late := each():
                within = f"within {self._timeout_s:g} s"
                return f"{names(late[:1])} did not come {within}; its process is alive: see what it does"
        return None

    def _watch(self) -> None:
        busy_since: float | None = None
        while not self._closed.wait(_POLL_S):
            if (cause := self.cause()) is None or self._is_idle():
                busy_since = None
                continue
            if busy_since is None:
                busy_since = time.monotonic()
                # at once: between hosts NCCL notices too, and ends the process without a name.
                # standard error as Python has it may be locked by the thread that waits
                text = f"RankLost: {cause}\n  the device of rank {self._heartbeat.rank} waits for it\n"
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
            if time.monotonic() - busy_since > _PATIENCE_S:
                os._exit(1)

    def _is_idle(self) -> bool:
        try:
            return bool(torch.cuda.default_stream(self._device).query())
        except RuntimeError:
            # the device has failed, or a capture is under way that will not end
            return False
