"""Whether a path is a bundle: by the file that every bundle has; and whether one can be written there."""

from pathlib import Path

from partitioner.errors import BundleError

__all__ = ["MANIFEST", "is_bundle", "require_new"]

MANIFEST = "manifest.json"


def is_bundle(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).exists()


def require_new(folder: str | Path) -> None:
    """Raises where something is there already."""
    path = Path(folder)
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise BundleError(f"{path} exists and is not an empty folder: name another one, or remove it first")
