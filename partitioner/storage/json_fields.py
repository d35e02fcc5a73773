"""The JSON files of a checkpoint's folder, for whoever needs a few fields and no model: a rank imports no transformers,
which takes a process seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from partitioner.errors import CaptureError

__all__ = ["read_fields"]


def read_fields(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a folder. Raises `CaptureError` where there is none."""
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise CaptureError(f"cannot read the configuration {path}: {reason}") from error
    if not isinstance(fields, dict):
        raise CaptureError(f"{path} must be a JSON object, got a {type(fields).__name__}")
    return fields
