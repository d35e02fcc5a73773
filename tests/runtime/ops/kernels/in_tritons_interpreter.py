"""Triton's kernels on a CPU, by its own interpreter: that is chosen when triton is imported, so in another process."""

import importlib.util
import os
import subprocess
import sys

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def assert_interpreted(code: str, *, timeout_s: int = 240) -> None:
    """Runs `code`, which asserts what it is about."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
