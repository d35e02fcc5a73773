"""A port that nobody has, for processes that start later."""

from __future__ import annotations

import random
import socket

__all__ = ["free_port"]

_BELOW = range(12000, 32000)
"""Below those that a system gives to whoever asks for any: in between, nobody else who starts now is given it."""


def free_port() -> int:
    draw = random.SystemRandom()
    for _ in range(1000):
        port = draw.choice(_BELOW)
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise RuntimeError(f"a thousand ports from {_BELOW.start} to {_BELOW.stop} are taken")
