"""Memory that several processes of one host have mapped, which also tells who of them is alive.

    Segment.create(num_bytes, room)    the first process; `address` is what the others need
    Segment.open(address)              the others
    hold(i), is_held(i)                i is held until its holder lets go or its process ends, however that happens

The memory is an anonymous file (memfd): it has no name in /dev/shm or anywhere else, so that no crash leaves anything
behind, and a container's limit on /dev/shm does not apply. The others reach it through /proc while the first one lives;
where they cannot, they do not share a host, or may not share memory. Holding is a POSIX lock on one byte of that file:
the kernel drops it with the process, it holds across pid namespaces, and a zombie holds none.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Address", "Segment"]


@dataclass(frozen=True)
class Address:
    """Where a segment is to be found by other processes of its host."""

    pid: int
    descriptor: int
    name: str
    num_bytes: int

    @classmethod
    def of(cls, fields: Sequence[Any]) -> Address:
        """From what another rank says; OSError where that is no address."""
        if [type(field) for field in fields] != [int, int, str, int] or not re.fullmatch(r"[\w.-]{1,80}", fields[2]):
            raise OSError(f"no address of a segment: {str(fields)[:100]}")
        return cls(*fields)


class Segment:
    """See the module's docstring; OSError where the system does not let us."""

    def __init__(self, descriptor: int, address: Address) -> None:
        self.address = address
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, address.num_bytes)
        self._map.madvise(mmap.MADV_DONTDUMP)  # which would make room for what nobody has written
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @classmethod
    def create(cls, num_bytes: int, room: int = 0) -> Segment:
        """Filled with zeros. room: so many bytes besides, which the system gives when they are first asked for."""
        name = f"partitioner-{secrets.token_hex(8)}"
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            # all of it now, not page by page in the midst of collectives
            os.posix_fallocate(descriptor, 0, num_bytes)
            os.ftruncate(descriptor, num_bytes + room)
            return cls(descriptor, Address(os.getpid(), descriptor, name, num_bytes + room))
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, address: Address) -> Segment:
        path = f"/proc/{address.pid}/fd/{address.descriptor}"
        # a process of the same number in another pid namespace has something else there
        if address.name not in (found := os.readlink(path)):
            raise OSError(f"{path} is {found} here, not the segment {address.name}")
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(descriptor, address)
        except BaseException:
            os.close(descriptor)
            raise

    def hold(self, index: int) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, index)

    def is_held(self, index: int) -> bool:
        """Whether another process holds it; one's own locks never stand in one's way."""
        try:
            # shared: those who ask at the same time do not take each other for the holder
            fcntl.lockf(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, index)
        except OSError:
            return True
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, index)
        return False

    def close(self) -> None:
        """Let go of what is held; the memory lives as long as anyone has it mapped."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
