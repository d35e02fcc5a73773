"""Start the ranks of one machine as local processes, and see that all of them end.

    launch([module, argument, ...], num_ranks=4)   parent: returns when all have succeeded, raises RankLost otherwise
    begin_worker()                                 worker: first thing to call
    read_given()                                   worker: the bytes that the parent gave to launch(.., given=..)
    write_answer(b"...")                           worker: what launch returns, in the order of ranks
    refuse(error)                                  worker: ends it; launch raises InputError, once for all ranks
    with told_to_launch(): ...                     worker: errors of ours end it, by `refuse` or in one line

A failing rank ends the others, and so does the deadline, a signal to the parent, and the parent's death
(`worker.py`). Their output goes straight to the parent's. Workers start with `python -P`, so that a folder
named runtime/ where the user stands is not imported in place of this one.

Nobody else has a part in it: the ranks meet through memory that they inherit (a memfd: it has no name and no port,
other users may not open it, and it is gone with the last process), and what is given and answered goes the same way.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, MappingProxyType
from typing import NoReturn

from partitioner.errors import CommunicationError, InputError, PartitionerError, RankLost
from runtime.processes.capacity import require_capacity
from runtime.processes.place import LOCAL_STORE, REPLICA

__all__ = [
    "GIVEN",
    "begin_worker",
    "end_ranks",
    "inherited",
    "launch",
    "read_given",
    "refuse",
    "require_timeout",
    "signal_name",
    "start_rank",
    "told_to_launch",
    "write_answer",
    "write_memory",
]

LONGEST_S = 1e7
"""Some months; timers of the operating system end somewhere beyond."""

GIVEN, _ANSWER = "PARTITIONER_GIVEN", "PARTITIONER_ANSWER"
_REFUSED = b"\0refused\0"
"""An answer that begins so says what is wrong with what was given."""
_PATIENCE_S = 5.0
"""How long a rank has between being asked to end and being made to."""
_LOOPBACK = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_RAS_ENABLE": "0",  # a port that tells anyone about the job
}
"""Whatever the user has set for jobs over hosts."""
_DEFAULTS = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}  # as torchrun has it
_NOT_INHERITED = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_", "PARTITIONER_SECRET", "PARTITIONER_API_KEY", REPLICA)
"""Where this process is a rank of something itself."""


def launch(
    module: Sequence[str],
    *,
    num_ranks: int,
    timeout_s: float = 600.0,
    given: bytes = b"",
    name: Callable[[int], str] = "rank {}".format,
) -> list[bytes]:
    """Run `python -P -m module[0] module[1:]` once per rank; call from the main thread (it handles signals).

    Returns what each rank answered. name: how errors call a rank. Refuses more ranks than this machine has room for,
    before it starts any. Raises InputError with what the first rank said that refused what it was given (`refuse`).
    """
    require_timeout(timeout_s)
    if sys.platform != "linux":
        raise InputError("ranks are started by us on Linux only; use torchrun here, or --simulate")
    require_capacity(num_ranks)
    deadline = time.monotonic() + timeout_s
    files: list[int] = []
    try:
        for what in ("store", "given", *("answer" for _ in range(num_ranks))):
            files.append(os.memfd_create(f"partitioner-{what}", os.MFD_CLOEXEC))
        store, question, *answers = files
        write_memory(question, given)
        ranks: list[subprocess.Popen[bytes]] = []
        with _told_once(answers), _signals() as signals:
            try:
                for rank, answer in enumerate(answers):
                    inherits = {GIVEN: question, _ANSWER: answer}
                    ranks.append(start_rank(module, rank, num_ranks, store=store, files=inherits))
                number = _wait(ranks, signals, deadline, timeout_s, name)
                end_ranks(ranks, number)
            finally:
                end_ranks(ranks, signal.SIGTERM)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number:
            sys.exit(128 + number)
        return [_read(answer) for answer in answers]
    finally:
        for file in files:
            os.close(file)


def require_timeout(timeout_s: float) -> None:
    if not 0 < timeout_s <= LONGEST_S:  # to a timer, 0 is no limit
        raise InputError(f"the timeout must be more than 0 and at most {LONGEST_S:g} seconds, got {timeout_s:g}")


def begin_worker() -> None:
    """Share the cores between the ranks of this machine."""
    import torch  # here: whoever starts ranks, or checks what they are to be told, needs none

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks_here))


def read_given() -> bytes:
    """In a rank that `launch` started: what it was given."""
    return _read(inherited(GIVEN))


def write_answer(answer: bytes) -> None:
    """In a rank that `launch` started: what it returns for this rank."""
    write_memory(inherited(_ANSWER), answer)


def refuse(error: Exception) -> NoReturn:
    """In a rank that `launch` started: ends it, where what was given is wrong, so that each rank may find the same."""
    write_answer(_REFUSED + str(error).encode(errors="replace"))
    sys.exit(2)


@contextmanager
def told_to_launch() -> Iterator[None]:
    """In a rank that `launch` started: an error of ours ends it in one line, or is what the rank refuses."""
    try:
        yield
    except CommunicationError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except PartitionerError as error:
        refuse(error)


@contextmanager
def _told_once(answers: Sequence[int]) -> Iterator[None]:
    """Of ranks that have ended because one has refused what all were given, that is the reason."""
    try:
        yield
    except RankLost:
        for said in map(_read, answers):
            if said.startswith(_REFUSED):
                raise InputError(said.removeprefix(_REFUSED).decode()) from None
        raise


def inherited(name: str) -> int:
    """A descriptor that `start_rank` passed on."""
    if name not in os.environ:
        raise InputError(f"{name} is not set: this process was not started by runtime.processes.launch")
    return int(os.environ[name])


def _read(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def write_memory(file: int, content: bytes) -> None:
    """All of a memfd's content."""
    os.ftruncate(file, 0)
    at = 0
    while at < len(content):
        at += os.pwrite(file, content[at:], at)


def start_rank(
    module: Sequence[str],
    rank: int,
    num_ranks: int,
    *,
    store: int,
    files: Mapping[str, int],
    variables: Mapping[str, object] = MappingProxyType({}),
) -> subprocess.Popen[bytes]:
    """One rank, which ends with the thread that starts it.

    store: the memory in which the ranks meet. files: descriptors that it inherits, by the variables that name them.
    variables: of its environment, beside what says which rank of how many it is.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "GROUP_RANK": 0}
    own = {**place, LOCAL_STORE: f"/proc/self/fd/{store}", **files, **variables}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "runtime.processes.worker", str(os.getpid()), *module],
        env={**_DEFAULTS, **ours, **_LOOPBACK, **{name: str(value) for name, value in own.items()}},
        stdin=subprocess.DEVNULL,
        pass_fds=(store, *files.values()),
        start_new_session=True,
    )


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]],
    signals: int,
    deadline: float,
    timeout_s: float,
    name: Callable[[int], str],
) -> int:
    """0: all have succeeded, or the signal that came before; RankLost as soon as one rank has not succeeded."""
    with selectors.DefaultSelector() as selector:
        handles = [os.pidfd_open(rank.pid) for rank in ranks]
        try:
            for handle, rank in zip(handles, ranks, strict=True):
                selector.register(handle, selectors.EVENT_READ, rank)
            selector.register(signals, selectors.EVENT_READ)
            while len(selector.get_map()) > 1:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise RankLost(f"the ranks did not finish within {timeout_s:g} s and were stopped")
                for key, _ in selector.select(min(left_s, 3600)):
                    if key.fd == signals:
                        return os.read(signals, 1)[0]
                    if key.data.wait() == 0:
                        selector.unregister(key.fd)
                if failed := {place: rank for place, rank in enumerate(ranks) if rank.poll()}:
                    raise RankLost(_describe(failed, name))
            return 0
        finally:
            for handle in handles:
                os.close(handle)


def _describe(failed: dict[int, subprocess.Popen[bytes]], name: Callable[[int], str]) -> str:
    def order(rank: int) -> tuple[bool, int]:
        return failed[rank].returncode > 0, rank  # a signal is a cause, the others' errors are its consequences

    rank = min(failed, key=order)
    code = failed[rank].returncode
    how = f"was ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    return f"{name(rank)} {how} (process {failed[rank].pid}; its output is above); all other ranks were stopped"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def end_ranks(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Asks those that still run to end, with all that they started, and after a while makes them; a stopped one too."""
    deadline = time.monotonic() + _PATIENCE_S
    for rank in ranks:
        if rank.poll() is None:
            _signal(rank, number)
            _signal(rank, signal.SIGCONT)
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(rank, signal.SIGKILL)
            rank.wait()


def _signal(rank: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(rank.pid, number)


@contextmanager
def _signals() -> Iterator[int]:
    """A pipe with a byte for every signal that asks this process to end.

    None of them raises where it comes: a rank that is just being started would be forgotten. One that this process
    was started to ignore (`nohup`, a shell's background job) is ignored still.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def take(number: int, frame: FrameType | None) -> None:
        with suppress(BlockingIOError):
            os.write(writer, bytes([number]))

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, take) for number in heeded}
    try:
        yield reader
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
