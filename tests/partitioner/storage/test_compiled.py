"""Compiled programs in the user's cache: found again, and only where all that they follow from is the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from partitioner import Plan, partition
from partitioner.storage import compiled
from partitioner.storage.bundle.bundle import Bundle
from partitioner.storage.example import EXAMPLE_MODEL

IDS = torch.tensor([[5, 17, 9, 33, 2]])
PLAN = Plan(tp=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the example model for two ranks."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        _use(patch, home)
        parts = partition(EXAMPLE_MODEL, PLAN)
        assert compiled.keep(key(), lambda folder: parts.save(folder, reference=True, digests=False))
    return home


@pytest.fixture
def cache(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, to be spoilt: the folder of the program."""
    shutil.copytree(home, tmp_path / "home")
    _use(monkeypatch, tmp_path / "home")
    found = compiled.cache_folder()
    assert found is not None
    return found / key()


def _use(patch: pytest.MonkeyPatch, home: Path) -> None:
    patch.setenv("XDG_CACHE_HOME", str(home))
    patch.delenv(compiled.NO_CACHE)


def key(checkpoint: Path = EXAMPLE_MODEL, plan: Plan = PLAN, **asked: Any) -> str:
    found = compiled.key_of(checkpoint, plan, **{"dtype": None, "max_length": None, **asked})
    assert found is not None
    return found


def find() -> Bundle | None:
    return compiled.find(key(), EXAMPLE_MODEL, mapped=False)


def test_what_is_kept_is_found_and_says_the_same(cache: Path) -> None:
    found = find()
    assert found is not None
    assert found.mesh.size("tp") == 2
    assert torch.equal(found.simulate(input_ids=IDS), partition(EXAMPLE_MODEL, PLAN).simulate(input_ids=IDS))


def test_no_weight_of_the_checkpoint_is_copied(cache: Path) -> None:
    held = sum(path.stat().st_size for path in cache.glob("weights/*"))
    assert held * 100 < sum(path.stat().st_size for path in EXAMPLE_MODEL.glob("*.safetensors"))


def test_the_key_follows_what_is_asked_for_and_the_checkpoint(tmp_path: Path) -> None:
    known = {
        key(),
        key(plan=Plan(tp=3)),
        key(dtype="float32"),
        key(max_length=7),
        key(plan=Plan(tp=2, keep_whole=["*"])),
    }
    assert len(known) == 5
    copied = Path(shutil.copytree(EXAMPLE_MODEL, tmp_path / "model"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert key(copied) not in known
    assert compiled.key_of(EXAMPLE_MODEL, Plan(passes=["fuse"]), dtype=None, max_length=None) is None


def test_a_folder_that_cannot_be_read_has_no_key(tmp_path: Path) -> None:
    """Whoever opens it says why."""
    folder = tmp_path / "model"
    shutil.copytree(EXAMPLE_MODEL, folder)
    os.mkfifo(folder / "pipe.json")  # would be waited for
    known = compiled.key_of(folder, Plan(tp=2), dtype=None, max_length=None)
    assert known is not None
    (folder / "gone.json").symlink_to(tmp_path / "nothing")
    assert compiled.key_of(folder, Plan(tp=2), dtype=None, max_length=None) is None


def test_turned_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.NO_CACHE, "1")
    assert find() is None
    assert not compiled.keep("0" * 64, lambda folder: folder.mkdir())


def _graph(cache: Path) -> None:
    path = next(cache.glob("graphs/*"))
    path.write_text(path.read_text().replace("add", "sub", 1))


def _weights(cache: Path) -> None:
    path = next(cache.glob("weights/*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _cut(cache: Path) -> None:
    (cache / "manifest.json").write_bytes(b"{")


def _others(cache: Path) -> None:
    cache.chmod(0o777)


def _others_above(cache: Path) -> None:
    cache.parent.chmod(0o777)


@pytest.mark.parametrize("spoil", [_graph, _weights, _cut, _others, _others_above])
def test_what_is_spoilt_is_not_used(spoil: Any, cache: Path) -> None:
    assert find() is not None
    spoil(cache)
    assert find() is None


def test_what_cannot_be_kept_is_told(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, or a folder of somebody else's: every start compiled again, without a word."""

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    assert not compiled.keep("0" * 64, full)
    assert "the compiled program is not kept, so the next start compiles again: " in caplog.text
    assert "No space left on device" in caplog.text
    caplog.clear()
    assert compiled.keep(key(), full)  # another process has kept it
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not caplog.text
    assert not compiled.keep(key(), lambda folder: folder.mkdir())
    assert "is not kept" in caplog.text


def test_the_oldest_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "KEPT", 1)
    assert compiled.keep("0" * 64, lambda folder: folder.mkdir())
    assert not cache.exists()


def test_what_is_kept_is_not_made_again(cache: Path) -> None:
    def refuse() -> Any:
        raise AssertionError("it is there")

    found = compiled.found_or_kept(key(), EXAMPLE_MODEL, refuse, mapped=False)
    assert isinstance(found, Bundle)
    with pytest.raises(AssertionError, match="it is there"):
        compiled.found_or_kept(None, EXAMPLE_MODEL, refuse, mapped=False)


def test_what_another_process_has_put_there_meanwhile_stays(cache: Path) -> None:
    shutil.rmtree(cache)

    def save(folder: Path) -> None:
        folder.mkdir()
        cache.mkdir(mode=0o700)
        (cache / "theirs").touch()

    assert compiled.keep(key(), save)
    assert [each.name for each in cache.iterdir()] == ["theirs"]
    assert list(cache.parent.iterdir()) == [cache]


def test_what_cannot_be_written_leaves_what_is_there(cache: Path) -> None:
    def save(folder: Path) -> None:
        folder.mkdir()
        raise OSError("no room")

    assert compiled.keep(key(), save)  # what is there already
    assert not compiled.keep("0" * 64, save)
    assert list(cache.parent.iterdir()) == [cache]
    assert find() is not None
