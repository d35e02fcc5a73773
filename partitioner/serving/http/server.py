"""The process that serves: its socket, its signals, its end.

SIGTERM, SIGINT   nothing new is taken (503), what runs has `grace_s` to finish, the rest is told why it ends; then exit
the same again    what runs ends now
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn

from partitioner.errors import InputError
from partitioner.serving.http.app import create_app
from partitioner.serving.http.connections import Connection
from partitioner.serving.http.service import Service

__all__ = ["bound", "config_of", "serve_on"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKLOG = 1024
_LARGEST_HEAD = 16 << 10
_IDLE_S = 75
_LINGER_S = 0.5
_LAST_S = 5
"""How long connections have after the last answer."""


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: one that is free."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError, ValueError, OverflowError) as error:  # the last three: no name of a host, no port
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise InputError(f"cannot listen on {host} port {port}: {reason}") from error


def config_of(service: Service) -> uvicorn.Config:
    """How its requests are read and answered; without signals and without an end."""
    return uvicorn.Config(
        create_app(service),
        # whatever else is installed: h11 keeps to the limit of headers
        http=partial(Connection, head_s=service.limits.body_s, send_s=service.limits.send_s),  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        h11_max_incomplete_event_size=_LARGEST_HEAD,
        timeout_keep_alive=_IDLE_S,
        timeout_graceful_shutdown=_LAST_S,
    )


def serve_on(service: Service, listening: socket.socket, *, grace_s: float, ready: Callable[[], None]) -> None:
    """Returns after the end that a signal has asked for; `ready` is called once connections are taken."""
    asyncio.run(_Server(config_of(service)).run_until_told(service, listening, grace_s, ready))


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are ours

    async def run_until_told(
        self, service: Service, listening: socket.socket, grace_s: float, ready: Callable[[], None]
    ) -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Event()

        def hear() -> None:
            if told.is_set():
                service.cut()
            told.set()

        for number in _SIGNALS:
            loop.add_signal_handler(number, hear)
        serving = asyncio.create_task(self.serve(sockets=[listening]))
        ending = asyncio.create_task(self._end_when(told, service, grace_s))
        while not self.started and not serving.done():
            await asyncio.sleep(0.01)
        if self.started:
            ready()
        await serving
        ending.cancel()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    async def _end_when(self, told: asyncio.Event, service: Service, grace_s: float) -> None:
        await told.wait()
        # connections are taken meanwhile, so that who asks is told to ask elsewhere
        await service.drain(grace_s)
        # who is just connecting gets an answer as well, and balancers see that /health is red
        await asyncio.sleep(_LINGER_S)
        self.should_exit = True
