"""Compiled once, kept, and said plainly where it cannot be."""

import shutil
import threading
from pathlib import Path

import pytest

from runtime.communication.shared_memory import shared_memory
from runtime.ops.kernels.native.build_native import CannotBuild, Native, load
from runtime.ops.kernels.native.own_folder import OwnFolder

FOLDER = Path(shared_memory.__file__).parent
SOURCES = [FOLDER / "shared_memory.cpp", FOLDER / "mailboxes.cpp"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "partitioner"


@pytest.fixture
def small(tmp_path: Path) -> list[Path]:
    """A source that is compiled soon; what compiles it is the same for all."""
    path = tmp_path / "small.cpp"
    path.write_text('extern "C" int group_advance() { return 3; }\n')
    return [path]


def test_it_is_compiled_once(cache: Path) -> None:
    assert load(SOURCES, timeout_s=60).seconds > 0
    again = load(SOURCES, timeout_s=60)
    assert again.seconds == 0
    assert again.library.group_advance
    assert len(list(cache.glob("*.so"))) == 1
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}


@pytest.mark.usefixtures("cache")
def test_of_several_at_once_one_compiles(small: list[Path]) -> None:
    found: list[Native] = []
    threads = [threading.Thread(target=lambda: found.append(load(small, timeout_s=60))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.seconds > 0 for one in found) == [False, False, False, True]


def test_waiting_for_who_compiles_is_bounded(cache: Path) -> None:
    with (
        OwnFolder.open(cache) as folder,
        folder.locked("shared_memory.lock", 1),
        pytest.raises(CannotBuild, match=r"another process is compiling: .*for 0.1 s"),
    ):
        load(SOURCES, timeout_s=0.1)


def test_what_does_not_load_is_not_used(cache: Path, small: list[Path]) -> None:
    load(small, timeout_s=60)
    (library,) = cache.glob("*.so")
    library.unlink()
    library.write_bytes(b"not a library")
    assert load(small, timeout_s=60).library.group_advance() == 3


def test_without_a_place_to_keep_it_every_process_has_its_own(
    small: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    assert load(small, timeout_s=60).library.group_advance() == 3


@pytest.mark.usefixtures("cache")
def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotBuild, match=r"no C\+\+ compiler found \(g\+\+, c\+\+, clang\+\+\)"):
        load(SOURCES, timeout_s=60)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo that is no C++ >&2; exit 1", "/cxx failed on .*shared_memory.cpp:\nthat is no C"),
        ("exec sleep 20", "/cxx did not finish within 0.5 s"),
    ],
)
def test_what_the_compiler_says_is_passed_on(
    script: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!{shutil.which('sh')}\n{script}\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CannotBuild, match=message):
        load(SOURCES, timeout_s=0.5 if "sleep" in script else 60)
