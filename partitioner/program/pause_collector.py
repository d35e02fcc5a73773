"""The cyclic garbage collector paused while programs are traced and compiled.

What is made then, nodes above all, mostly stays, and every full collection walks all of it and all that is imported:
a third of the time of a large compile. What becomes garbage meanwhile is found by the collections afterwards.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ["collector_paused"]

_lock = threading.Lock()
_inside = 0
"""How many are within, in all threads: the collector is the process's."""
_was_enabled = False


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """As a `with` block or a decorator; the last one out leaves the collector as the first one found it."""
    global _inside, _was_enabled
    with _lock:
        if _inside == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0 and _was_enabled:
                gc.enable()
