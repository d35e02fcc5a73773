"""How a weight's columns share their scales, found out once: by what looks at the weight before steps are captured."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["are_in_order", "largest_of", "run_of"]

_RUNS = (128, 64, 32)

_runs: Any = WeakTensorKeyDictionary()
_orders: Any = WeakTensorKeyDictionary()
_largest: Any = WeakTensorKeyDictionary()


def run_of(columns: Tensor) -> int:
    """So many columns, from any multiple of it on, share their scale; 0 where there is no such number among `_RUNS`."""
    if columns in _runs:
        return int(_runs[columns])
    if columns.is_cuda and torch.cuda.is_current_stream_capturing():
        return 0
    on_host = columns.cpu()
    borders = (on_host.diff().nonzero().view(-1) + 1).tolist()
    least = math.gcd(0, *borders)
    _runs[columns] = next((run for run in _RUNS if least % run == 0), 0)
    return int(_runs[columns])


def are_in_order(columns: Tensor, run: int) -> bool:
    """Whether column i has scale i // run."""
    if columns not in _orders:
        if columns.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        _orders[columns] = torch.equal(columns.cpu(), torch.arange(columns.shape[0], dtype=columns.dtype) // run)
    return bool(_orders[columns])


def largest_of(scales: Tensor) -> float:
    """The largest number of a weight's scales."""
    if scales not in _largest:
        if scales.is_cuda and torch.cuda.is_current_stream_capturing():
            return math.inf
        _largest[scales] = float(scales.max()) if scales.numel() else 0.0
    return float(_largest[scales])
