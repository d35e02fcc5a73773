"""Whether kernels in Triton can run here: it builds what launches them with the machine's C compiler."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

__all__ = ["missing_for_triton"]


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
