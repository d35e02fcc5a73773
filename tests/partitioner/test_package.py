"""`import partitioner`: lazy names, light leaves, a plain word where another `runtime` or `passes` is in the way."""

import subprocess
import sys
from pathlib import Path

import pytest

import partitioner

ROOT = Path(partitioner.__file__).resolve().parent.parent


def python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter whose sys.path starts with `folders`."""
    start = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]!r}\n"
    return subprocess.run([sys.executable, "-P", "-c", start + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("leaf", ["errors", "sharding.mesh", "sharding.layout"])
def test_leaf_pulls_in_nothing_else(leaf: str) -> None:
    done = python(f"import partitioner.{leaf}; print(*sys.modules, sep='\\n')", ROOT)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "torch" not in loaded
    assert "transformers" not in loaded
    ours = {name for name in loaded if name.split(".")[0] in ("partitioner", "passes", "runtime")}
    leaves = {f"partitioner.sharding.{name}" for name in ("index_set", "layout", "mesh")}
    assert ours <= {"partitioner", "partitioner.errors", "partitioner.sharding", *leaves}
    assert f"partitioner.{leaf}" in ours


def test_ranks_of_a_bundle_start_without_what_they_do_not_need() -> None:
    """Importing transformers takes a process seconds."""
    done = python("import partitioner; partitioner.load; import partitioner.compile.parts, runtime.engine.engine\n"
                  "print(*sys.modules, sep='\\n')", ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"partitioner.storage.bundle.bundle", "runtime.engine.engine"} <= loaded
    assert not loaded & {"transformers", "torch._dynamo", "torch._inductor"}


def test_every_exported_name_is_there() -> None:
    for name in partitioner.__all__:
        assert getattr(partitioner, name) is not None
        assert name in dir(partitioner)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Pla'"):
        _ = partitioner.Pla


@pytest.mark.parametrize("name", ["runtime", "passes"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_shadowing_package_is_named(tmp_path: Path, name: str, as_folder: bool) -> None:
    other = tmp_path / name / "__init__.py" if as_folder else tmp_path / f"{name}.py"
    other.parent.mkdir(exist_ok=True)
    other.write_text("")
    done = python("import partitioner.errors", tmp_path, ROOT)
    assert done.returncode != 0
    assert f"ImportError: partitioner needs its own package {name!r}" in done.stderr
    assert str(other) in done.stderr
    assert str(ROOT / name / "__init__.py") in done.stderr


def test_shadowing_package_already_imported(tmp_path: Path) -> None:
    (tmp_path / "runtime.py").write_text("")
    done = python(f"import runtime; sys.path[:] = [{str(ROOT)!r}, *sys.path]; import partitioner", tmp_path)
    assert done.returncode != 0
    assert str(tmp_path / "runtime.py") in done.stderr


def test_folder_that_is_no_package_does_not_shadow(tmp_path: Path) -> None:
    """Python itself prefers a real package later on sys.path to a plain folder earlier on."""
    (tmp_path / "runtime").mkdir()
    done = python("import partitioner", tmp_path, ROOT)
    assert done.returncode == 0, done.stderr


def test_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "partitioner").symlink_to(ROOT / "partitioner")
    code = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]; import partitioner"
    done = python(code, tmp_path)
    assert done.returncode != 0
    assert "partitioner needs its package 'runtime'" in done.stderr
