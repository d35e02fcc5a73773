"""Ranks that are launched over a folder take the program that was compiled for the last start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import partitioner
from partitioner import Plan, partition
from partitioner.errors import CaptureError
from partitioner.storage import compiled
from partitioner.storage.example import EXAMPLE_MODEL

pytestmark = [pytest.mark.processes, pytest.mark.slow]
PLAN = Plan(tp=2)
IDS = torch.tensor([[5, 17, 9, 33, 2]])
REFUSES = """
import torch
def export(*args, **kwargs):
    raise RuntimeError("a rank traces")
torch.export.export = export
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Path:
    """A cache with nothing in it, and ranks that cannot trace."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(compiled.NO_CACHE)
    (tmp_path / "sitecustomize.py").write_text(REFUSES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{pytestconfig.rootpath}")
    found = compiled.cache_folder()
    assert found is not None
    return found


def test_one_program_is_compiled_for_all_ranks_and_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = partition(EXAMPLE_MODEL, PLAN).generate(IDS, max_new_tokens=4)
    with partitioner.launch(EXAMPLE_MODEL, PLAN, compiled_cache=True) as llm:
        assert torch.equal(llm.generate(IDS, max_new_tokens=4), expected)  # type: ignore[arg-type]
    (kept,) = home.iterdir()
    monkeypatch.setattr(torch.export, "export", None)  # the second start compiles nowhere
    with partitioner.launch(EXAMPLE_MODEL, PLAN, compiled_cache=True) as llm:
        assert torch.equal(llm.generate(IDS, max_new_tokens=4), expected)  # type: ignore[arg-type]
    assert list(home.iterdir()) == [kept]


def test_without_being_asked_each_rank_compiles(home: Path) -> None:
    with pytest.raises((CaptureError, partitioner.RankLost), match="a rank traces"):
        partitioner.launch(EXAMPLE_MODEL, PLAN)
    assert not home.exists()
