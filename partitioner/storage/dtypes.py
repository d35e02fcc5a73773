"""The dtypes that a model may have, as a user names them.

dtype_named("bfloat16")    torch.bfloat16; `require_named` checks the name, without torch
dtype_asked("auto")        None, as for None: what the checkpoint or the configuration has; `require_asked` checks
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partitioner.errors import CaptureError

if TYPE_CHECKING:
    import torch

__all__ = ["dtype_asked", "dtype_named", "require_asked", "require_named"]

_NAMES = ("float64", "float32", "bfloat16", "float16")


def require_named(name: str) -> None:
    if name not in _NAMES:
        raise CaptureError(f"unknown dtype {name!r}; the dtypes are {', '.join(_NAMES)}")


def dtype_named(name: str) -> torch.dtype:
    require_named(name)
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def require_asked(name: str | None) -> None:
    if name not in (None, "auto"):
        require_named(str(name))


def dtype_asked(name: str | None) -> torch.dtype | None:
    return None if name in (None, "auto") else dtype_named(str(name))
