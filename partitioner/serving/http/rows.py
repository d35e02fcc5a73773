"""Rows of the model as they come, for code that waits for many things at once.

    async for steps in steps_of(llm, prompt, options): ...     leaving the loop early frees the row

The thread that watches over the replicas only leaves word, and wakes the loop once for all that came with a step: a
wake for each row would hand the interpreter to the loop and back between any two of them. No thread waits for a token.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from runtime.generation.generation_options import Options
from runtime.generation.generation_request import Step
from runtime.launching.jobs import Call
from runtime.launching.launched import Launched

__all__ = ["steps_of"]


async def steps_of(llm: Launched, prompt: Sequence[int], options: Options) -> AsyncGenerator[list[Step]]:
    """One or more steps at a time. Raises what the row met."""
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    wakes = _wakes.setdefault(loop, _Wakes(loop))

    def heard() -> None:
        if not news.is_set():
            wakes.set_soon(news)

    begun = asyncio.ensure_future(asyncio.to_thread(lambda: llm.begin([prompt], heard=heard, **options)))
    try:
        call = await asyncio.shield(begun)
    except asyncio.CancelledError:
        begun.add_done_callback(lambda done: _leave(llm, done))
        raise
    taken = 0
    try:
        while True:
            news.clear()
            is_over = call.is_over  # before looking: what comes between is seen the next time
            if steps := call.come(taken):
                taken += len(steps)
                yield steps
            elif is_over:
                return
            else:
                await news.wait()
    finally:
        if not call.is_over:
            _leave_soon(llm, call)


class _Wakes:
    """Events of one loop that other threads have set."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._events: deque[asyncio.Event] = deque()
        self._is_told = False

    def set_soon(self, event: asyncio.Event) -> None:
        """Any thread may ask."""
        self._events.append(event)  # before looking: who is told already takes it as well
        loop = self._loop()
        if self._is_told or loop is None or loop.is_closed():
            return
        self._is_told = True
        loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        self._is_told = False  # before taking: what comes from now on is told again
        while self._events:
            self._events.popleft().set()


_wakes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Wakes] = weakref.WeakKeyDictionary()


_leaving: set[asyncio.Future[None]] = set()
"""Held until they are done: the loop keeps only weak references."""


def _leave(llm: Launched, begun: asyncio.Future[Call]) -> None:
    if not begun.cancelled() and begun.exception() is None:
        _leave_soon(llm, begun.result())


def _leave_soon(llm: Launched, call: Call) -> None:
    # it waits for the thread of the replicas, which this one must not
    task = asyncio.ensure_future(asyncio.to_thread(llm.leave, call))
    _leaving.add(task)
    task.add_done_callback(_left)


def _left(task: asyncio.Future[None]) -> None:
    _leaving.discard(task)
    if not task.cancelled():
        task.exception()  # the replicas have been ended meanwhile
