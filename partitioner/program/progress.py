"""What is being done, for who wants to see it, and how long it took.

    with timed("trace"): ...              in the code that does it
    with watched(listener): ...           around it: the listener hears of each step as it begins and ends

Steps may lie within steps. Without a listener a step costs nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

__all__ = ["Listener", "timed", "watched"]


class Listener(Protocol):
    def begin(self, name: str) -> None: ...

    def end(self, name: str, seconds: float) -> None: ...


_listening: list[Listener] = []
"""Of the process, not of a thread: what several ranks of one process ask for is compiled once, by any of them."""


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    if not _listening:
        yield
        return
    listener, start = _listening[-1], time.perf_counter()
    listener.begin(name)
    try:
        yield
    finally:
        listener.end(name, time.perf_counter() - start)


@contextlib.contextmanager
def watched(listener: Listener) -> Iterator[None]:
    _listening.append(listener)
    try:
        yield
    finally:
        _listening.remove(listener)
