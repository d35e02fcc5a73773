"""Code that is kept in a cache runs only where nobody else can have put it there."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.communication.shared_memory import shared_memory
from runtime.ops.kernels.native import build_native
from runtime.ops.kernels.native.build_native import _name, load

SOURCE = Path(shared_memory.__file__).with_name("shared_memory.cpp")
NAME = _name([SOURCE])
STRANGER = 65534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that leaves a trace when it is loaded, and has none of our functions."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cpp").write_text(
        "#include <cstdio>\n#include <cstdlib>\n"
        '__attribute__((constructor)) static void run() { if (FILE* f = fopen(getenv("TRACE"), "w")) fclose(f); }\n'
    )
    library = folder / "planted.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, folder / "planted.cpp"], check=True)
    return library


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiler that has done its work already."""
    folder = tmp_path_factory.mktemp("compiler")
    flags = build_native._FLAGS
    subprocess.run(["g++", *flags, "-o", folder / "done.so", SOURCE], check=True)
    script = folder / "cxx"
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp {folder / "done.so"} "$2"\n')
    script.chmod(0o700)
    return script


@pytest.fixture(autouse=True)
def _compiler(compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    return tmp_path / "extensions" / "partitioner"


def put(library: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, mode=0o700)
    shutil.copy(library, folder / NAME)
    (folder / NAME).chmod(0o755)
    return folder / NAME


def folder_of_another(library: Path, cache: Path) -> None:
    put(library, cache)
    os.chown(cache, STRANGER, STRANGER)


def folder_that_others_write(library: Path, cache: Path) -> None:
    put(library, cache)
    cache.chmod(0o777)


def folder_that_the_group_writes(library: Path, cache: Path) -> None:
    put(library, cache)
    cache.chmod(0o770)


def folder_that_is_a_link(library: Path, cache: Path) -> None:
    elsewhere = cache.parent.parent / "elsewhere"
    put(library, elsewhere)
    cache.parent.mkdir()
    cache.symlink_to(elsewhere)


def file_of_another(library: Path, cache: Path) -> None:
    os.chown(put(library, cache), STRANGER, STRANGER)


def file_that_others_write(library: Path, cache: Path) -> None:
    put(library, cache).chmod(0o777)


def file_that_is_a_link(library: Path, cache: Path) -> None:
    put(library, cache).unlink()
    (cache / NAME).symlink_to(library)


PLANTS = [
    folder_of_another,
    folder_that_others_write,
    folder_that_the_group_writes,
    folder_that_is_a_link,
    file_of_another,
    file_that_others_write,
    file_that_is_a_link,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_library_does_not_run(plant: Callable[[Path, Path], None], planted: Path, cache: Path) -> None:
    plant(planted, cache)
    found = load([SOURCE], timeout_s=60)
    assert not (cache.parent.parent / "trace").exists()
    assert found.library.group_advance
    assert found.seconds > 0


def test_the_planted_library_would_leave_a_trace(planted: Path, cache: Path) -> None:
    ctypes.CDLL(str(put(planted, cache)))
    assert (cache.parent.parent / "trace").exists()


def test_without_a_home_nothing_is_loaded_from_where_one_stands(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is neither HOME nor an account
    monkeypatch.chdir(tmp_path)
    put(planted, tmp_path / "~" / ".cache" / "torch_extensions" / "partitioner")
    assert load([SOURCE], timeout_s=60).seconds > 0
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("kind", ["link", "hard link of another", "pipe"])
def test_a_planted_lock_spoils_no_file(kind: str, cache: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    cache.mkdir(parents=True, mode=0o700)
    lock = cache / "shared_memory.lock"
    if kind == "link":
        lock.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        os.chown(victim, STRANGER, STRANGER)
        lock.hardlink_to(victim)
    assert load([SOURCE], timeout_s=60).library.group_advance
    assert victim.read_text() == "precious"


def test_a_hard_link_of_our_own_is_not_truncated(cache: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    cache.mkdir(parents=True, mode=0o700)
    (cache / "shared_memory.lock").hardlink_to(victim)
    load([SOURCE], timeout_s=60)
    assert victim.read_text() == "precious"
