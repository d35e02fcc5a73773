"""A connection that neither asks nor reads is given up, whatever it does to seem alive.

    head_s     from the connection, or from the first byte of a further request, to the end of the request's head
    send_s     how long nothing of what waits to be read is read

Bodies have a time of their own (`BodyLimit`), and so have requests. Without these two, a client that sends a letter of
a header now and then, or asks for much and reads nothing, holds its connection, and the rows of a stream, as long as it
likes.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from partitioner.serving.openai.errors import invalid

__all__ = ["Connection"]


class Connection(H11Protocol):
    """See the module's docstring; the rest as uvicorn has it."""

    def __init__(self, *, head_s: float, send_s: float, **given: Any) -> None:
        super().__init__(**given)
        self._head_s, self._send_s = head_s, send_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self._head_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_timer = _cancel(self._head_timer)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_s, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP never comes to the application, and is told of in its form all the same."""
        body = json.dumps(invalid(msg).body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body)):
            self.transport.write(self.conn.send(event))
        self.transport.write(self.conn.send(h11.EndOfMessage()))
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self._send_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._send_timer = _cancel(self._send_timer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer, self._send_timer = _cancel(self._head_timer), _cancel(self._send_timer)
        super().connection_lost(exc)


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """What is left of it: nothing."""
    if timer is not None:
        timer.cancel()
    return None
