"""A connection between a process and a rank that it has started: whole messages, plain data, in both directions.

ours, theirs = pair()                  a pair of sockets without a name: nobody else can come to it
connection = Connection(ours)
connection.send({"kind": "grant"})     JSON behind its length, 8 bytes; never pickle
connection.receive()                   waits for the next; None: the other end is gone
connection.received()                  what has come already
"""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

__all__ = ["Connection", "Message", "pair"]

Message = dict[str, Any]
_LENGTH_BYTES = 8
_CHUNK = 1 << 16


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


class Connection:
    """See the module's docstring. Any thread may send, one receives."""

    def __init__(self, end: socket.socket, *, timeout_s: float | None = None) -> None:
        """timeout_s: how long sending may take, where the other end does not read."""
        self.socket = end
        end.settimeout(timeout_s)
        self._sending = threading.Lock()
        self._unread = bytearray()
        self._complete: list[Message] = []

    def send(self, message: Message) -> None:
        """Raises OSError where the other end is gone, or does not read."""
        content = json.dumps(message).encode()
        with self._sending:
            self.socket.sendall(len(content).to_bytes(_LENGTH_BYTES, "big") + content)

    def receive(self) -> Message | None:
        while not self._complete:
            if not self._read(0):
                return None
        return self._complete.pop(0)

    def received(self) -> tuple[list[Message], bool]:
        """Messages, and whether more may come. Does not wait."""
        try:
            is_open = self._read(socket.MSG_DONTWAIT)
        except BlockingIOError:
            is_open = True
        found, self._complete = self._complete, []
        return found, is_open

    def close(self) -> None:
        self.socket.close()

    def _read(self, flags: int) -> bool:
        try:
            content = self.socket.recv(_CHUNK, flags)
        except ConnectionError:
            return False
        self._unread += content
        while len(self._unread) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(self._unread[:_LENGTH_BYTES], "big")
            if len(self._unread) < end:
                break
            self._complete.append(json.loads(bytes(self._unread[_LENGTH_BYTES:end])))
            del self._unread[:end]
        return bool(content)
