"""Whether a path is a bundle: by the file that every bundle has."""

from pathlib import Path

__all__ = ["MANIFEST", "is_bundle"]

MANIFEST = "manifest.json"


def is_bundle(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).exists()
