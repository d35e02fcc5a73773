"""Memory of zeros that takes none before it is written to: `torch.zeros` writes all of it at once."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["untouched_zeros"]

_LEAST_BYTES = 1 << 20
"""Below this, pages cost more than they save."""


def untouched_zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU, the system maps their pages when they are first written to."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LEAST_BYTES:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError):  # more than there may be: torch says it in its own way
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))
