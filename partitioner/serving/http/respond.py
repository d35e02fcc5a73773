"""Sending what comes: a whole answer, or a stream of events; either ends at once when the client goes away.

data: {"id": ..., "choices": [...]}      one event per piece, as server-sent events (WHATWG HTML, section 9.2)
data: {"error": {...}}                   what went wrong after the first event
data: [DONE]
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from partitioner.serving.openai.errors import ApiError, of_exception

__all__ = ["EventStream", "while_connected"]

_log = logging.getLogger("partitioner.serving")
T = TypeVar("T")


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Does the work; gives it up and raises ClientDisconnect where the client goes away before it is done."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Events as they come, `first` before them. left: called where the client goes away, or does not read."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: dict[str, Any],
        events: AsyncGenerator[dict[str, Any]],
        *,
        left: Callable[[], None],
        timeout_s: float,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first, self._events, self._left, self._timeout_s = first, events, left, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            try:
                async with asyncio.timeout(self._timeout_s):
                    await while_connected(receive, self._send(send))
            except (ClientDisconnect, TimeoutError):
                self._left()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send(_event(json.dumps(self._first, ensure_ascii=False)))
        try:
            async for event in self._events:
                await send(_event(json.dumps(event, ensure_ascii=False)))
            await send(_event("[DONE]"))
        except Exception as error:
            failure = of_exception(error)
            if not isinstance(error, ApiError) and failure.status == 500:
                _log.exception("a stream has failed")
            await send(_event(json.dumps(failure.body)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(text: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}
