"""A chat template, run with limits: it is a program that came with a model, and may go on without end.

    render(tokenizer, messages)             one text
    with Renderer(tokenizer) as renderer:   many, from any thread
        renderer.render(messages)

transformers runs it in jinja's sandbox, which keeps it from files and code but not from time and memory. So it runs in
a process of its own, with nothing open but the connection that its text comes through, and with a limit of memory. One
process renders many texts, so that the template is compiled once; one that takes too long is ended, and another made.
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
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

__all__ = ["Renderer", "TemplateFailed", "render"]

LONGEST_S = 5.0
LARGEST = 64 * 2**20
"""Of the text; what it is made of may take sixteen times as much."""
_LENGTH_BYTES = 8
_WORKER = 0
"""The one descriptor that the process has."""


class TemplateFailed(Exception):
    """Why there is no text."""


def render(tokenizer: Any, messages: list[dict[str, str]], *, timeout_s: float = LONGEST_S) -> str:
    """The messages as the tokenizer's template puts them, up to where the answer begins."""
    with Renderer(tokenizer, timeout_s=timeout_s) as renderer:
        return renderer.render(messages)


class Renderer:
    """See the module's docstring. The tokenizer's template must not change meanwhile."""

    def __init__(self, tokenizer: Any, *, timeout_s: float = LONGEST_S) -> None:
        self._tokenizer, self._timeout_s = tokenizer, timeout_s
        self._turn = threading.Lock()
        self._child: tuple[int, socket.socket] | None = None

    def render(self, messages: list[dict[str, str]]) -> str:
        """Raises TemplateFailed. One text at a time; others wait."""
        with self._turn:
            try:
                answer = self._asked(json.dumps(messages).encode())
            except BaseException:
                self._end()
                raise
        found = json.loads(answer)
        if "text" not in found:
            raise TemplateFailed(found["error"])
        return str(found["text"])

    def close(self) -> None:
        with self._turn:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _asked(self, question: bytes) -> bytes:
        if self._child is None:
            self._child = self._start()
        _, line = self._child
        deadline = time.monotonic() + self._timeout_s
        late = TemplateFailed(f"it did not end within {self._timeout_s:g} s")
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
            raise TemplateFailed(f"it took too much memory, or wrote more than {LARGEST >> 20} MB") from error
        return bytes(received[_LENGTH_BYTES:])

    def _start(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        with warnings.catch_warnings():
            # the child runs nothing but the template: no lock that another thread holds is waited for
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _serve(self._tokenizer, theirs, self._timeout_s)
        theirs.close()
        return child, ours

    def _end(self) -> None:
        if self._child is None:
            return
        child, line = self._child
        self._child = None
        line.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(tokenizer: Any, line: socket.socket, timeout_s: float) -> NoReturn:
    """The process: a text for each list of messages, until nobody asks any more."""
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
            answer: dict[str, str]
            try:
                messages = json.loads(question)
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                answer = {"text": text}
            except Exception as error:  # templates are programs, and raise what they like
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
