"""Work with limits of time and memory, in a process of its own: what others wrote, and what may go on without end.

    process = BoundedProcess(work, timeout_s=5.0)     work: what is asked, as JSON, to what is answered
    process.ask(question)                             raises WorkFailed where it failed, or went over a limit
    process.close()

The process is a fork, with nothing open but the connection that its questions come through. It does many pieces of
work, one at a time; one that takes too long is ended with it, and another process made for the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["LARGEST", "BoundedProcess", "WorkFailed"]

LARGEST = 64 * 2**20
"""Of an answer; what it is made of may take sixteen times as much."""
_LENGTH_BYTES = 8
_WORKER = 0
"""The one descriptor that the process has."""


class WorkFailed(Exception):
    """Why there is no answer."""


class BoundedProcess:
    """See the module's docstring. What `work` reads must not change meanwhile."""

    def __init__(self, work: Callable[[Any], Any], *, timeout_s: float) -> None:
        self._work, self._timeout_s = work, timeout_s
        self._turn = threading.Lock()
        self.child: tuple[int, socket.socket] | None = None

    def ask(self, question: Any) -> Any:
        """One question at a time; others wait."""
        with self._turn:
            try:
                answer = self._asked(json.dumps(question).encode())
            except BaseException:
                self._end()
                raise
        found = json.loads(answer)
        if "error" in found:
            raise WorkFailed(found["error"])
        return found["answer"]

    def close(self) -> None:
        with self._turn:
            self._end()

    def _asked(self, question: bytes) -> bytes:
        if self.child is None:
            self.child = self._start()
        _, line = self.child
        deadline = time.monotonic() + self._timeout_s
        late = WorkFailed(f"it did not end within {self._timeout_s:g} s")
        try:
            line.settimeout(self._timeout_s)
            line.sendall(len(question).to_bytes(_LENGTH_BYTES, "big") + question)
            received = bytearray()
            wanted = _LENGTH_BYTES
            while len(received) < wanted:
                if not select.select([line], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise late
                some = line.recv(1 << 16)
                if not some:
                    raise ConnectionError
                received += some
                if len(received) >= _LENGTH_BYTES:
                    wanted = _LENGTH_BYTES + int.from_bytes(received[:_LENGTH_BYTES], "big")
        except TimeoutError as error:
            raise late from error
        except ConnectionError as error:
            raise WorkFailed(f"it took too much memory, or answered with more than {LARGEST >> 20} MB") from error
        return bytes(received[_LENGTH_BYTES:])

    def _start(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():
            # the child does nothing but the work: no lock that another thread holds is waited for
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _serve(self._work, theirs, self._timeout_s)
        theirs.close()
        return child, ours

    def _end(self) -> None:
        if self.child is None:
            return
        child, line = self.child
        self.child = None
        line.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(work: Callable[[Any], Any], line: socket.socket, timeout_s: float) -> NoReturn:
    """The process: an answer to each question, until nobody asks any more."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(line.detach(), _WORKER)
        os.closerange(_WORKER + 1, 1 << 16)
        if sys.platform == "linux":
            limit = _used_bytes() + 16 * LARGEST
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        while (question := _read()) is not None:
            # also where nobody is left to end it
            signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)
            answer: dict[str, Any]
            try:
                answer = {"answer": work(json.loads(question))}
            except Exception as error:  # whatever it was
                answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            content = json.dumps(answer).encode()
            if len(content) > LARGEST:
                break
            content = len(content).to_bytes(_LENGTH_BYTES, "big") + content
            at = 0
            while at < len(content):
                at += os.write(_WORKER, content[at:])
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        os._exit(0)


def _read() -> bytes | None:
    """The next question; None: there will be none."""
    received = bytearray()
    wanted = _LENGTH_BYTES
    while len(received) < wanted:
        some = os.read(_WORKER, wanted - len(received))
        if not some:
            return None
        received += some
        if len(received) == _LENGTH_BYTES:
            wanted += int.from_bytes(received, "big")
    return bytes(received[_LENGTH_BYTES:])


def _used_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
