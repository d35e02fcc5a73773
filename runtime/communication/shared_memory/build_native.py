"""C++ that comes with the package, compiled on the user's machine when it is first needed, and loaded with ctypes.

load("shared_memory.cpp", timeout_s=60)   -> Native: the library, and the seconds that compiling took (0.0: cached)

It is kept in the user's cache (TORCH_EXTENSIONS_DIR, or torch_extensions in XDG_CACHE_HOME or ~/.cache) under a hash of
its source and of how it is built. Of several processes that come at once, one compiles and the others wait for it. Only
a compiler is needed: no headers of Python or torch, no build system.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CannotBuild", "Native", "load"]

_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")


class CannotBuild(Exception):
    """Why there is no library: no compiler, or what it said."""


@dataclass(frozen=True)
class Native:
    """A loaded library."""

    library: ctypes.CDLL
    seconds: float
    """How long compiling took; 0.0 where it was in the cache."""


def load(source: str, *, timeout_s: float) -> Native:
    """The library of `source`, a file in this folder; waits for the compiler, or for who compiles, `timeout_s`."""
    path = Path(__file__).with_name(source)
    text = path.read_bytes()
    name = _name(path.stem, text)
    try:
        folder = _cache()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _lock(folder / f"{path.stem}.lock", timeout_s):
            if (library := folder / name).exists():
                return Native(_open(library), 0.0)
            seconds = _compile(path, library, timeout_s)
        return Native(_open(library), seconds)
    except OSError:
        # nowhere to keep it, or what is kept there does not load here: one for this process alone
        try:
            with tempfile.TemporaryDirectory(prefix="partitioner-") as own:
                seconds = _compile(path, Path(own, name), timeout_s)
                return Native(_open(Path(own, name)), seconds)
        except OSError as error:
            raise CannotBuild(f"{source} cannot be built or loaded: {error}") from error


def _name(stem: str, text: bytes) -> str:
    built = repr((_FLAGS, platform.machine(), platform.libc_ver())).encode()
    return f"{stem}-{hashlib.blake2b(text + built, digest_size=10).hexdigest()}.so"


def _cache() -> Path:
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given, "partitioner")
    # expanduser raises where there is no home
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions", "partitioner")


def _open(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


@contextmanager
def _lock(path: Path, timeout_s: float) -> Iterator[None]:
    """One process at a time; the kernel lets go of it when a process ends, however that happens."""
    deadline = time.monotonic() + timeout_s
    with path.open("wb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CannotBuild(f"another process has been compiling for {timeout_s:g} s ({path})") from None
                time.sleep(0.02)
        yield


def _compile(source: Path, library: Path, timeout_s: float) -> float:
    start = time.monotonic()
    given = shlex.split(os.environ.get("CXX", ""))
    found = given or [name for name in _COMPILERS if shutil.which(name)][:1]
    if not found or shutil.which(found[0]) is None:
        raise CannotBuild(f"no C++ compiler found ({', '.join(given[:1] or _COMPILERS)})")
    # under a name of its own first: nobody ever loads half a file
    unfinished = library.with_name(f"{library.name}.{os.getpid()}")
    try:
        done = subprocess.run(
            [*found, *_FLAGS, "-o", str(unfinished), str(source)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != 0:
            raise CannotBuild(f"{found[0]} failed on {source}:\n{done.stderr.strip()[-2000:]}")
        os.replace(unfinished, library)
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"{found[0]} did not finish within {timeout_s:g} s") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return time.monotonic() - start
