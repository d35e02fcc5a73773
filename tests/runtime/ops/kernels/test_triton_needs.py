import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from runtime.ops.kernels import triton_needs
from runtime.ops.kernels.triton_needs import missing_for_triton


@pytest.mark.parametrize(
    ("package", "compiler", "header", "missing"),
    [
        (True, "gcc", True, ""),
        (True, "of-its-own", True, ""),
        (False, "gcc", True, "no triton"),
        (True, "", True, "no C compiler, which triton needs"),
        (True, "gcc", False, "no headers of Python, which triton needs"),
    ],
)
def test_what_is_missing_is_named(
    package: bool, compiler: str, header: bool, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> Any:
        return object() if package else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(triton_needs.shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.setenv("CC", "of-its-own")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    if header:
        (tmp_path / "Python.h").touch()
    missing_for_triton.cache_clear()
    assert missing_for_triton() == missing
    missing_for_triton.cache_clear()
