"""Start the ranks of one machine as local processes, with torchrun's own launcher, and see that all of them end.

    launch([module, argument, ...], num_ranks=4)   parent: returns when all have succeeded, raises RankLost otherwise
    begin_worker()                                 worker: first thing to call

A failing rank ends the others, and so does the deadline, a signal to the parent, and the parent's death
(`worker.py`). Their output goes straight to the parent's. Workers start with `python -P`, so that a folder
named runtime/ where the user stands is not imported in place of this one.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from partitioner.errors import InputError, RankLost

__all__ = ["begin_worker", "launch", "require_timeout"]

LONGEST_S = 1e7
"""Some months; timers of the operating system end somewhere beyond."""


def launch(module: Sequence[str], *, num_ranks: int, timeout_s: float = 600.0, folder: str = "") -> None:
    """Run `python -P -m module[0] module[1:]` once per rank; call from the main thread (it handles signals).

    `folder`: one that the workers remove where this process is killed and so cannot.
    """
    require_timeout(timeout_s)
    with tempfile.TemporaryDirectory(prefix="partitioner-") as logs, _ends_stopped(), _deadline(timeout_s), _quiet():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.05,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        left_behind = os.pathsep.join(filter(None, [logs, folder]))
        try:
            elastic_launch(config, sys.executable)(
                "-P", "-m", "runtime.processes.worker", str(os.getpid()), left_behind, *module
            )
        except ChildFailedError as error:
            raise RankLost(_describe(error)) from None
        except SignalException as ended:
            if ended.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + ended.sigval)


def require_timeout(timeout_s: float) -> None:
    if not 0 < timeout_s <= LONGEST_S:  # to a timer, 0 is no limit
        raise InputError(f"the timeout must be more than 0 and at most {LONGEST_S:g} seconds, got {timeout_s:g}")


def begin_worker() -> None:
    """Share the cores between the ranks of this machine."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks_here))


def _describe(error: ChildFailedError) -> str:
    def order(pair: tuple[int, ProcessFailure]) -> tuple[int, int, int]:
        # a signal is a cause, the peers' errors are its consequences, and SIGTERM is what the launcher sends
        code = pair[1].exitcode
        return (0 if code < 0 and code != -signal.SIGTERM else 1 if code > 0 else 2, pair[1].timestamp, pair[0])

    rank, failure = min(error.failures.items(), key=order)
    how = (
        f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
    )
    return f"rank {rank} {how} (process {failure.pid}; its output is above); all other ranks were stopped"


@contextmanager
def _deadline(timeout_s: float) -> Iterator[None]:
    def expire(number: int, frame: FrameType | None) -> None:
        raise RankLost(f"the ranks did not finish within {timeout_s:g} s and were stopped")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _ends_stopped() -> Iterator[None]:
    """Lets ranks that are stopped end when they are asked to: torchrun's launcher would wait for half a minute."""
    over = threading.Event()
    children = Path(f"/proc/self/task/{os.getpid()}/children")  # those that the main thread started

    def watch() -> None:
        while children.exists() and not over.wait(0.05):
            for pid in map(int, children.read_text().split()):
                with suppress(OSError):
                    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                    pending = int(fields["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1
                    if fields["State"].startswith("T") and pending:
                        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=watch, daemon=True, name="end stopped ranks")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _quiet() -> Iterator[None]:
    """The launcher reports a failed rank in forty lines; `_describe` says it in one."""
    logger = logging.getLogger("torch.distributed.elastic")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
