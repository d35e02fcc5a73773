"""What the tests of bundles share: a valid bundle, a copy of it to spoil, and a canary."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.bundle_forger import folder, valid

__all__ = ["canary", "folder", "valid"]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a bundle would run to do harm fails the test instead."""
    called: list[str] = []

    def trap(name: str) -> Callable[..., Any]:
        return lambda *_, **__: called.append(name)

    monkeypatch.chdir(tmp_path)
    for module, name in ((os, "system"), (os, "popen"), (torch, "load"), (torch, "from_file")):
        monkeypatch.setattr(module, name, trap(name))
    yield
    assert not called
    assert not (tmp_path / "canary").exists()
