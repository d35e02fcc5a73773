"""Files that a command will write, looked at before it does what takes longer."""

from __future__ import annotations

from pathlib import Path

from partitioner.errors import InputError

__all__ = ["require_file"]


def require_file(option: str, path: str | None) -> None:
    """Raises where `path`, given for `option`, cannot be a file; None: nothing will be written."""
    if path is not None and (not path or Path(path).is_dir() or not Path(path).resolve().parent.is_dir()):
        raise InputError(f"{option} {path}: give a file in a folder that exists")
