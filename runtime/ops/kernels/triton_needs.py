"""Whether kernels in Triton can run here: it builds what launches them with the machine's C compiler."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["can_run", "missing_for_triton"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def missing_for_triton() -> str:
    """What is missing; "": nothing."""
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang") if name):
        return "no C compiler, which triton needs"
    scheme = sysconfig.get_default_scheme()
    # as triton has it: Debian's own scheme names a folder that holds no headers
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    if not Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h").is_file():
        return "no headers of Python, which triton needs"
    return ""


def can_run(rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels for one token can read such rows here: numbers of `dtype`, or codes that stand for them."""
    if rows.device.type != "cuda" or dtype not in _DTYPES or missing_for_triton():
        return False
    return rows.dtype in (dtype, torch.uint8)
