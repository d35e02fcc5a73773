"""A folder whose files nobody else can have written, for libraries that will be loaded.

    with OwnFolder.open(path) as folder:      made where it is missing; NotOurs where others own it or may write to it
        folder.add(name, content)             whole or not at all
        folder.library(name)                  loaded; None where there is no such file; NotOurs as above
        with folder.locked(name, 60): ...     one process at a time

All is done by a descriptor of the folder, so that it does not matter who may rename what leads to it. No link is
followed, and nothing that is there is ever written to.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Busy", "NotOurs", "OwnFolder"]

_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class NotOurs(Exception):
    """Somebody else may have put it there."""


class Busy(Exception):
    """Another process holds the lock."""


class OwnFolder:
    """See the module's docstring."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[OwnFolder]:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
        except NotADirectoryError:
            raise NotOurs(f"{path} is a link, or no folder") from None
        try:
            _require_ours(path, descriptor)
            yield cls(path, descriptor)
        finally:
            os.close(descriptor)

    def read(self, name: str) -> bytes:
        """Of a folder that only we may enter: what a compiler left there may have any mode."""
        with os.fdopen(os.open(name, os.O_RDONLY | _FLAGS, dir_fd=self._descriptor), "rb") as file:
            return file.read()

    def add(self, name: str, content: bytes) -> None:
        """In the place of any other of that name, which who has it open keeps."""
        unfinished = f"{name}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
        try:
            with os.fdopen(os.open(unfinished, flags, 0o700, dir_fd=self._descriptor), "wb") as file:
                file.write(content)
            os.rename(unfinished, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished, dir_fd=self._descriptor)
            raise

    def library(self, name: str) -> ctypes.CDLL | None:
        try:
            descriptor = self._open(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            # by the descriptor that was looked at, which stays open: the loader takes two libraries of one path for one
            by_descriptor = Path(f"/proc/self/fd/{descriptor}")
            return ctypes.CDLL(str(by_descriptor if by_descriptor.exists() else self.path / name))
        except BaseException:
            os.close(descriptor)
            raise

    @contextmanager
    def locked(self, name: str, timeout_s: float) -> Iterator[None]:
        """Raises Busy after `timeout_s`; the kernel lets go of it when a process ends, however that happens."""
        deadline = time.monotonic() + timeout_s
        descriptor = self._open(name, os.O_RDWR | os.O_CREAT)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise Busy(f"another process has held {self.path / name} for {timeout_s:g} s") from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)

    def _open(self, name: str, flags: int) -> int:
        try:
            descriptor = os.open(name, flags | _FLAGS, 0o600, dir_fd=self._descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:  # ELOOP of a link, ENXIO of a pipe
            raise NotOurs(f"{self.path / name} cannot be opened as a plain file: {error.strerror}") from None
        try:
            _require_ours(self.path / name, descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise NotOurs(f"{self.path / name} is no plain file")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _require_ours(path: Path, descriptor: int) -> None:
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid():
        raise NotOurs(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if found.st_mode & _OTHERS_MAY_WRITE:
        raise NotOurs(f"{path} may be written by others (mode {stat.S_IMODE(found.st_mode):o}): chmod go-w {path}")
