"""How much is taken: sizes of bodies and texts, requests at a time, seconds.

A body is counted while it comes, so that neither a false length nor none at all gets past the limit.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from partitioner.errors import InputError
from partitioner.serving.openai.errors import ApiError, invalid

__all__ = ["BodyLimit", "Limits"]

_LETTERS = 64
"""Of a token: more than any text has on average, but for what tokenizers make nothing of."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes at most."""

    max_length: int
    """Tokens of a text, prompt and answer. Of a prompt, at most 64 times as many letters are looked at."""
    max_requests: int = 256
    """Rows that run or wait: a choice of a request is one."""
    max_choices: int = 128
    """Rows of one request: its prompts times `n`."""
    max_body_bytes: int = 4 << 20
    max_bodies: int = 64
    """How many of the largest bodies there is memory for: those of all requests that are read or answered."""
    body_s: float = 30.0
    """How long a body may take to come, and the head of a request before it."""
    send_s: float = 60.0
    """How long a client may read nothing of what waits for it."""
    request_s: float = 600.0
    """How long a request may take in all."""

    @property
    def most_letters(self) -> int:
        """A text of more is refused before it is made into tokens, which would take seconds for each million."""
        return _LETTERS * self.max_length

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 2 if name == "max_length" else 1
            if name.endswith("_s") and not value > 0:
                raise InputError(f"{name} must be more than 0 seconds, got {value}")
            if not name.endswith("_s") and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")


class BodyLimit:
    """Around the application: reads each body whole before anything else is done, within its limits."""

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._held_bytes = 0
        """Of the bodies of all requests that are not answered yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, taken = bytearray(), 0
        try:
            try:
                async with asyncio.timeout(self._limits.body_s):
                    is_whole = await self._read(scope, receive, body)
            except TimeoutError:
                failure = invalid(f"The body did not come within {self._limits.body_s:g} s.", status=408)
            except ApiError as error:
                failure = error
            else:
                if is_whole:
                    whole, taken = bytes(body), len(body)
                    body.clear()
                    await self._app(scope, _replay(whole, receive), send)
                return
        finally:
            self._held_bytes -= len(body) + taken
        headers = {"connection": "close", **({"retry-after": "1"} if failure.status == 429 else {})}
        answer = JSONResponse(failure.body, status_code=failure.status, headers=headers)
        await answer(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> bool:
        """False: the client went away."""
        most = self._limits.max_body_bytes
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > most:
            raise _too_large(most)
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            come = message.get("body", b"")
            if len(body) + len(come) > most:
                raise _too_large(most)
            if self._held_bytes + len(come) > self._limits.max_bodies * most:
                raise ApiError(
                    429,
                    "The bodies of other requests take all the memory that this server has for them; try again later.",
                    kind="rate_limit_error",
                    code="queue_full",
                )
            body += come
            self._held_bytes += len(come)
            if not message.get("more_body", False):
                return True


def _too_large(most: int) -> ApiError:
    return invalid(f"The body has more than the {most} bytes that this server takes.", status=413)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, and then what comes: that the client has gone."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return parts.pop() if parts else await receive()

    return next_message
