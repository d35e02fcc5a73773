"""C++ that comes with the package, compiled on the user's machine when it is first needed, and loaded with ctypes.

load([Path("some.cpp")], timeout_s=60)    -> Native: the library, and the seconds that compiling took (0.0: cached)

It is kept in the user's cache (TORCH_EXTENSIONS_DIR, or torch_extensions in XDG_CACHE_HOME or ~/.cache) under a hash of
its sources, of the headers beside them, and of how it is built. Of several processes that come at once, one compiles
and the others wait for it. Only a compiler is needed: no headers of Python or torch, no build system. What is in the
cache is code that will run: it is used only where nobody else can have put it there (`own_folder.py`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.ops.kernels.native.own_folder import Busy, NotOurs, OwnFolder

__all__ = ["CannotBuild", "Native", "cache_folder", "load"]

_COMPILERS = ("g++", "c++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
_log = logging.getLogger("partitioner")


class CannotBuild(Exception):
    """Why there is no library: no compiler, or what it said."""


@dataclass(frozen=True)
class Native:
    """A loaded library."""

    library: ctypes.CDLL
    seconds: float
    """How long compiling took; 0.0 where it was in the cache."""


def load(sources: Sequence[Path], *, timeout_s: float, flags: Sequence[str] = ()) -> Native:
    """One library of `sources`, files of one folder; waits for the compiler, or for who compiles, `timeout_s`.

    flags: of the compiler, beside those that all libraries are built with.
    """
    path = sources[0]
    flags = (*_FLAGS, *flags)
    name = _name(sources, flags)
    try:
        with OwnFolder.open(cache_folder()) as folder, folder.locked(f"{path.stem}.lock", timeout_s):
            if (library := folder.library(name)) is not None:
                return Native(library, 0.0)
            return _made(folder, name, sources, flags, timeout_s)
    except Busy as error:
        raise CannotBuild(f"another process is compiling: {error}") from None
    except (NotOurs, OSError) as error:
        # nowhere to keep it, or what is kept there is not ours or does not load here: one for this process alone
        if isinstance(error, NotOurs):
            _log.warning("%s; so the library is compiled for this process alone", error)
        try:
            with tempfile.TemporaryDirectory(prefix="partitioner-") as own, OwnFolder.open(Path(own)) as folder:
                return _made(folder, name, sources, flags, timeout_s)
        except (NotOurs, OSError) as error:
            raise CannotBuild(f"{path} cannot be built or loaded: {error}") from error


def _made(folder: OwnFolder, name: str, sources: Sequence[Path], flags: Sequence[str], timeout_s: float) -> Native:
    with _compiled(sources, flags, timeout_s) as (content, seconds):
        folder.add(name, content)
    library = folder.library(name)
    if library is None:
        raise OSError(f"{name} is gone as soon as it was written")
    return Native(library, seconds)


def _name(sources: Sequence[Path], flags: Sequence[str] = _FLAGS) -> str:
    text = b"".join(each.read_bytes() for each in (*sources, *sorted(sources[0].parent.glob("*.h"))))
    built = repr((tuple(flags), platform.machine(), platform.libc_ver())).encode()
    return f"{sources[0].stem}-{hashlib.blake2b(text + built, digest_size=10).hexdigest()}.so"


def cache_folder() -> Path:
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given, "partitioner")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):  # there is no home: it would be where this process happens to stand
        raise OSError(f"there is no folder for caches: {home!r} is not absolute")
    return Path(home, "torch_extensions", "partitioner")


@contextmanager
def _compiled(sources: Sequence[Path], flags: Sequence[str], timeout_s: float) -> Iterator[tuple[bytes, float]]:
    """The library's bytes, and the seconds that it took."""
    start = time.monotonic()
    given = shlex.split(os.environ.get("CXX", ""))
    found = given or [name for name in _COMPILERS if shutil.which(name)][:1]
    if not found or shutil.which(found[0]) is None:
        raise CannotBuild(f"no C++ compiler found ({', '.join(given[:1] or _COMPILERS)})")
    with tempfile.TemporaryDirectory(prefix="partitioner-") as own, OwnFolder.open(Path(own)) as folder:
        try:
            done = subprocess.run(
                [*found, *flags, "-o", str(Path(own, "library.so")), *map(str, sources)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CannotBuild(f"{found[0]} did not finish within {timeout_s:g} s") from None
        if done.returncode != 0:
            raise CannotBuild(f"{found[0]} failed on {sources[0]}:\n{done.stderr.strip()[-2000:]}")
        yield folder.read("library.so"), time.monotonic() - start
