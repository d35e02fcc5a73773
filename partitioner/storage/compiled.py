"""Compiled programs, kept in the user's cache: the second start of a checkpoint with the same plan traces nothing.

    XDG_CACHE_HOME (or ~/.cache)/partitioner/compiled/KEY/     a bundle that refers to the checkpoint for its weights

KEY is a digest of all that a compile follows from: the checkpoint's configuration, and the names, shapes and places of
its tensors; the plan; the sources of this package and of transformers, and torch's version. What is found there is read
as any bundle is (nothing in it is run, and digests are checked), and only where nobody else can have put it there.
PARTITIONER_NO_CACHE=1 turns it off.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import transformers

from partitioner.errors import PartitionerError
from partitioner.program.plan import Plan
from partitioner.storage.bundle.bundle import Bundle, load
from partitioner.storage.recognise import MANIFEST
from runtime.ops.kernels.native.own_folder import NotOurs, OwnFolder
from runtime.weights.read_shards import Reader

__all__ = ["NO_CACHE", "cache_folder", "find", "found_or_kept", "keep", "key_of"]

NO_CACHE = "PARTITIONER_NO_CACHE"
KEPT = 32
"""Programs that are kept; of more, those that were used longest ago go."""

_OURS = ("partitioner", "passes", "runtime")
_SOURCES = (".py", ".cpp", ".json", ".yaml")
_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """Where programs are kept; None: they are not."""
    if os.environ.get(NO_CACHE, "0") not in ("", "0"):
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "partitioner", "compiled") if os.path.isabs(home) else None


def key_of(checkpoint: Path, plan: Plan, *, dtype: str | None, max_length: int | None) -> str | None:
    """None where what a compile follows from is not known: a plan with passes of its own, a file that is not there."""
    if plan.passes:
        return None
    try:
        files = list(_checkpoint(checkpoint))
    except OSError:  # told by who opens the checkpoint
        return None
    about = {
        "versions": [sys.version, torch.__version__, transformers.__version__],
        "sources": _sources(),
        "checkpoint": files,
        "asked": [repr(plan), dtype, max_length],
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def find(key: str, checkpoint: Path, *, mapped: bool) -> Bundle | None:
    """What `keep` put there; None where there is nothing, or nothing that may be used."""
    home = cache_folder()
    if home is None or not (home / key / MANIFEST).is_file():
        return None
    try:
        with OwnFolder.open(home), OwnFolder.open(home / key):
            found = load(home / key, checkpoint=checkpoint, mapped=mapped, checked=False)
            _check(found)
    except (PartitionerError, NotOurs, OSError) as error:
        _log.warning("the compiled program in %s is not used: %s", home / key, error)
        return None
    os.utime(home / key)
    return found


def keep(key: str, save: Callable[[Path], None]) -> bool:
    """`save` writes a bundle to a folder that does not exist yet. Whether it is kept now.

    It is there as a whole or not at all. What is there already is what `find` could not use, and goes, unless another
    process has put it there meanwhile.
    """
    home = cache_folder()
    if home is None:
        return False
    made, unusable = home / f".{key}.{os.getpid()}", home / f".{key}.{os.getpid()}.old"
    before = _identity(home / key)
    try:
        with OwnFolder.open(home):
            shutil.rmtree(made, ignore_errors=True)
            save(made)
            made.chmod(0o700)
            if _identity(home / key) == before:
                if before is not None:
                    os.rename(home / key, unusable)
                os.rename(made, home / key)
            for old in sorted(home.iterdir(), key=lambda each: -each.stat().st_mtime)[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
    except (PartitionerError, NotOurs, OSError) as error:
        if _is_kept(home / key):  # another process was quicker
            return True
        _log.warning("the compiled program is not kept, so the next start compiles again: %s", error)
        return False
    finally:
        for left in (made, unusable):
            shutil.rmtree(left, ignore_errors=True)
    return True


def _is_kept(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError:  # it may not even be looked at
        return False


def _identity(folder: Path) -> tuple[int, int] | None:
    """Which folder it is; None: there is none."""
    try:
        about = folder.lstat()
    except OSError:
        return None
    return about.st_dev, about.st_ino


class Saves(Protocol):
    """What was compiled."""

    def save(self, folder: str | Path, *, reference: bool, digests: bool) -> None: ...


Made = TypeVar("Made", bound=Saves)


def found_or_kept(
    key: str | None, checkpoint: Path, make: Callable[[], Made], *, mapped: bool, keeps: bool = True
) -> Bundle | Made:
    """The program with this key, or what `make` yields, which is kept from then on. key: None for neither."""
    found = None if key is None else find(key, checkpoint, mapped=mapped)
    if found is not None:
        return found
    made = make()
    if key is not None and keeps:
        keep(key, lambda folder: made.save(folder, reference=True, digests=False))
    return made


def _check(bundle: Bundle) -> None:
    """Digests of what the bundle holds itself; of what lies in the checkpoint, shapes and places are checked."""
    for name, file in bundle.manifest.files.items():
        if file.digest is not None:
            bundle.read(name)
    seen = set()
    for rank in range(bundle.mesh.world_size):
        own = [each for each in bundle.stored(rank) if each.file is not None and (each.file, each.key) not in seen]
        seen |= {(each.file, each.key) for each in own}
        Reader(bundle.files(own)).load([each.shard for each in own], torch.device("cpu"))


def _sources() -> str:
    """Ours by content; those of transformers, of which there are thousands, by size and time."""
    found = hashlib.sha256()
    for package in _OURS:
        for path in _files(package):
            found.update(path.encode() + Path(path).read_bytes())
    for path in _files("transformers"):
        about = os.stat(path)
        found.update(f"{path} {about.st_size} {about.st_mtime_ns}".encode())
    return found.hexdigest()


def _files(package: str) -> Iterator[str]:
    """In an order of their names; thousands of them, so that paths are text."""
    spec = importlib.util.find_spec(package)
    for home in spec.submodule_search_locations or () if spec is not None else ():
        for folder, inner, names in os.walk(home):
            inner.sort()
            yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(_SOURCES))


def _checkpoint(folder: Path) -> Iterator[object]:
    """What it says of the model, and where its tensors lie."""
    for path in sorted(folder.iterdir()):
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            continue  # nor does who opens the checkpoint read it
        if path.suffix == ".safetensors":
            yield path.name, about.st_size, about.st_mtime_ns, about.st_ino, _header(path)
        elif path.suffix in (".json", ".bin", ".gguf"):
            content = path.read_bytes() if path.suffix == ".json" else b""
            yield path.name, about.st_size, hashlib.sha256(content).hexdigest()


def _header(path: Path) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return hashlib.sha256(file.read(min(length, 1 << 27))).hexdigest()
