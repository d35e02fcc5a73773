"""The files of a bundle: written whole or not at all, read only as what they are said to be.

A name is a path within the folder; each part of it is opened without following links. A file must be a plain one, of
the size that is recorded, with the digest that is recorded. What is not recorded may not be there: `require_only`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from safetensors import SafetensorError

from partitioner.errors import BundleError

__all__ = ["NAME", "Folder", "digest_of", "read_within", "require_free", "writing"]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,120}(/[A-Za-z0-9_][A-Za-z0-9_.\-]{0,120}){0,3}")
LARGEST_TEXT = 2**30
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a named pipe must not make us wait


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def require_free(target: Path) -> None:
    """Raises BundleError where no folder can be written."""
    try:
        is_taken = target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir())))
        above = next(folder for folder in target.absolute().parents if folder.exists())
    except OSError as error:
        raise BundleError(f"cannot write the bundle {target}: {error.strerror}") from error
    if is_taken:
        raise BundleError(f"{target} exists and is not an empty folder: name another one, or remove it first")
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BundleError(f"cannot write the bundle {target}: {above} is no folder that may be written to")


@contextlib.contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `target` when all has gone well, and vanishes when not."""
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        require_free(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        partial.replace(target)
    except (OSError, SafetensorError) as error:  # the latter of a full disk, where weights are written
        raise BundleError(f"cannot write the bundle {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_within(folder: Path, name: str) -> bytes:
    """A file of a folder that others may have made, to be passed on: a link must not lead out of the folder.

    Those of the hub's cache lead from snapshots/REVISION/ to blobs/, which is the same model's.
    """
    path, home = (folder / name).resolve(), folder.resolve()
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(path.is_relative_to(each) for each in homes):
        raise BundleError(
            f"{folder / name} is a link that leads out of its folder, to {path}: what is there would become part of "
            "the bundle. Put a copy in its place if that is meant"
        )
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        raise BundleError(f"cannot open {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST_TEXT:
            raise BundleError(f"{path} is no plain file of at most {LARGEST_TEXT} bytes")
        return file.read(LARGEST_TEXT + 1)


class Folder:
    """A bundle's folder, for reading."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise BundleError(f"{self.path} is no folder")

    def require_only(self, names: Collection[str]) -> None:
        """Raises BundleError where there is anything beside the files `names`, and the folders that they lie in.

        Who reads a folder of a model takes what is there, by name: an added file would be used, and nothing tell it.
        """
        folders = {name[:end] for name in names for end, letter in enumerate(name) if letter == "/"}
        for folder in ("", *sorted(folders)):
            if not (path := self.path / folder).is_dir():
                continue  # what is missing is said when it is read
            with os.scandir(path) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if name in names or name in folders:
                        continue  # of what kind it is shows when it is opened
                    raise BundleError(
                        f"{self.path} has {name[:200]!r}, which its manifest does not list: remove what was added later"
                    )

    def check(self, name: str, *, bytes: int) -> Path:
        """The path of a plain file within the folder, of that size."""
        descriptor = self._open(name)
        try:
            self._require_size(name, descriptor, bytes)
        finally:
            os.close(descriptor)
        return self.path / name

    def read(self, name: str, *, bytes: int | None = None, digest: str | None = None) -> bytes:
        descriptor = self._open(name)
        with os.fdopen(descriptor, "rb") as file:
            size = self._require_size(name, descriptor, bytes)
            if size > LARGEST_TEXT:
                raise BundleError(f"{self.path / name} is too large: {size} bytes")
            content = file.read(size + 1)
        if digest is not None and digest_of(content) != digest:
            raise BundleError(
                f"{self.path / name} is damaged or was altered: its SHA-256 is {digest_of(content)}, and recorded is "
                f"{digest}"
            )
        return content

    def _open(self, name: str) -> int:
        """A descriptor of a plain file, no part of whose path is a link."""
        if not NAME.fullmatch(name) or ".." in name:
            raise BundleError(f"{name[:100]!r} is no name that a file of a bundle can have")
        *folders, last = name.split("/")
        at = -1
        try:
            at = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            for part in folders:
                within = os.open(part, _FLAGS | os.O_DIRECTORY, dir_fd=at)
                os.close(at)
                at = within
            found = os.open(last, _FLAGS, dir_fd=at)
        except OSError as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else f"{error.strerror} (a link, say)"
            raise BundleError(f"cannot open {name!r} of the bundle {self.path}: {reason}") from None
        finally:
            if at != -1:
                os.close(at)
        if not stat.S_ISREG(os.fstat(found).st_mode):
            os.close(found)
            raise BundleError(f"{name!r} of the bundle {self.path} is no plain file")
        return found

    def _require_size(self, name: str, descriptor: int, recorded: int | None) -> int:
        size = os.fstat(descriptor).st_size
        if recorded is not None and size != recorded:
            how = "cut short" if size < recorded else "longer than it should be"
            raise BundleError(f"{self.path / name} is {how}: it has {size} bytes, recorded are {recorded}")
        return size
