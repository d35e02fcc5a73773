"""Files asked for before they are read: all of their bytes, only where there is room, and never an error."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runtime.weights.read_ahead import read_ahead
from runtime.weights.safetensors_files import TensorFiles

SIZE = 300_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(SIZE, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Start and length of each hint."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, length, advice: found.append((start, length)))
    return found


def test_every_byte_of_a_tensor_is_asked_for(folder: Path, asked: list[tuple[int, int]]) -> None:
    thread = read_ahead(TensorFiles(folder), 10 * SIZE)
    assert thread is not None
    thread.join(timeout=10)
    assert asked[0][0] == 0
    assert all(start + length == after for (start, length), (after, _) in itertools.pairwise(asked))
    assert sum(asked[-1]) >= (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("free", [None, SIZE])
def test_nothing_is_asked_for_where_the_room_is_unknown_or_small(
    folder: Path, asked: list[tuple[int, int]], free: int | None
) -> None:
    assert read_ahead(TensorFiles(folder), free) is None
    assert not asked


def test_a_file_that_was_written_anew_is_left_to_who_reads_it(folder: Path, asked: list[tuple[int, int]]) -> None:
    files = TensorFiles(folder)
    save_file({"b": torch.zeros(3)}, folder / "model.safetensors")
    thread = read_ahead(files, 10 * SIZE)
    assert thread is not None
    thread.join(timeout=10)
    assert not asked
