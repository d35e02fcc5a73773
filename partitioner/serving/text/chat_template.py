"""A chat template, run with limits: it is a program that came with a model, and may go on without end.

transformers runs it in jinja's sandbox, which keeps it from files and code but not from time and memory. So it runs in
a process of its own, with nothing open but the pipe that its result comes through.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["TemplateFailed", "render"]

LONGEST_S = 5.0
LARGEST = 64 * 2**20
"""Of the text; what it is made of may take sixteen times as much."""


class TemplateFailed(Exception):
    """Why there is no text."""


def render(tokenizer: Any, messages: list[dict[str, str]], *, timeout_s: float = LONGEST_S) -> str:
    """The messages as the tokenizer's template puts them, up to where the answer begins."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # the child runs nothing but the template: no lock that another thread holds is waited for
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _render_in_child(tokenizer, messages, writer, timeout_s)
    os.close(writer)
    try:
        answer = _read(reader, time.monotonic() + timeout_s)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if answer is None:
        raise TemplateFailed(f"it did not end within {timeout_s:g} s")
    if not answer:
        raise TemplateFailed(f"it took too much memory, or wrote more than {LARGEST >> 20} MB")
    found = json.loads(answer)
    if "text" not in found:
        raise TemplateFailed(found["error"])
    return str(found["text"])


def _read(pipe: int, deadline: float) -> bytes | None:
    """All that comes; None: not before the deadline."""
    received = bytearray()
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        some = os.read(pipe, 1 << 16)
        if not some:
            return bytes(received)
        received += some
    return None


def _render_in_child(tokenizer: Any, messages: list[dict[str, str]], writer: int, timeout_s: float) -> NoReturn:
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        # also where nobody is left to end it
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)
        os.dup2(writer, 0)
        os.closerange(1, 1 << 16)
        if sys.platform == "linux":
            limit = _used_bytes() + 16 * LARGEST
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        answer: dict[str, str]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            answer = {"text": text}
        except Exception as error:  # templates are programs, and raise what they like
            answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        content = json.dumps(answer).encode()
        if len(content) <= LARGEST:
            at = 0
            while at < len(content):
                at += os.write(0, content[at:])
    finally:
        os._exit(0)


def _used_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
