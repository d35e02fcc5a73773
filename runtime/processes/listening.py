"""The TCP ports on which this process listens, and shutting them to newcomers.

    before = listening_sockets()        then something opens ports that it does not close, as gloo does for every group
    shut(listening_sockets() - before)  nobody connects there any more; what is connected stays so

A listening socket cannot be closed under the library that waits on it. But it can be given a filter that drops every
packet: connections that exist have sockets of their own, and a newcomer gets no answer.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

__all__ = ["listening_sockets", "shut"]

_LISTENING = "0A"
_SO_ATTACH_FILTER = 26
_DROP = struct.pack("HBBI", 0x06, 0, 0, 0)
"""BPF: return 0, "take no byte of it"."""


def listening_sockets() -> frozenset[tuple[int, int]]:
    """(inode, descriptor) of each; empty where the system does not tell."""
    own: dict[int, int] = {}
    for path in _entries(Path("/proc/self/fd")):
        try:
            target = os.readlink(path)
        except OSError:
            continue  # it was open while the folder was read
        if target.startswith("socket:["):
            own[int(target[8:-1])] = int(path.name)
    found = set()
    for table in ("tcp", "tcp6"):
        for line in _lines(Path("/proc/self/net", table)):
            fields = line.split()
            if fields[3] == _LISTENING and int(fields[9]) in own:
                found.add((int(fields[9]), own[int(fields[9])]))
    return frozenset(found)


def shut(sockets: Iterable[tuple[int, int]]) -> None:
    """Raises OSError where the system does not let us."""
    program = ctypes.create_string_buffer(_DROP)
    option = struct.pack("HP", 1, ctypes.addressof(program))
    for _, descriptor in sockets:
        with socket.socket(fileno=os.dup(descriptor)) as listening:
            listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _lines(table: Path) -> list[str]:
    return table.read_text().splitlines()[1:] if table.exists() else []
