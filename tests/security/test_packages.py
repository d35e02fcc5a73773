"""`runtime` and `passes` are plain names: what another distribution does to them is said when ours is imported."""

import base64
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import partitioner

ROOT = Path(partitioner.__file__).resolve().parent.parent
PACKAGES = ("partitioner", "runtime", "passes")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """As pip leaves a wheel of ours: files, and a RECORD with their digests."""
    folder = tmp_path / "site-packages"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "example_model"))
    record(folder, "partitioner", [path for name in PACKAGES for path in (folder / name).rglob("*") if path.is_file()])
    return folder


def record(site: Path, name: str, paths: list[Path]) -> None:
    info = site / f"{name}-0.1.0.dist-info"
    info.mkdir()
    rows = []
    for path in paths:
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        rows.append(f"{path.relative_to(site)},sha256={digest},{path.stat().st_size}")
    (info / "RECORD").write_text("\n".join([*rows, f"{info.name}/RECORD,,"]) + "\n")


def overwrite(site: Path, name: str) -> None:
    """What pip does with another wheel that has a file of that name: the last one stays."""
    (site / name).write_text("x = 1\n")
    record(site, "other_thing", [site / name])


def imported(site: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import partitioner.errors; print('well')"
    return subprocess.run([sys.executable, "-P", "-S", "-c", code], capture_output=True, text=True, env={}, check=False)


def test_what_was_installed_is_imported(site: Path) -> None:
    assert imported(site).stdout == "well\n"


@pytest.mark.parametrize("name", ["runtime/__init__.py", "passes/fuse.py", "runtime/processes/launch.py"])
def test_another_distribution_that_overwrites_ours_is_named(site: Path, name: str) -> None:
    overwrite(site, name)
    said = imported(site).stderr
    assert f"ImportError: {site / name} is not the file that was installed with partitioner" in said
    assert "overwritten by other_thing" in said


@pytest.mark.parametrize("name", ["runtime/ops/mask.py", "passes/fuse.py"])
def test_what_another_took_away_is_named(site: Path, name: str) -> None:
    overwrite(site, name)
    (site / name).unlink()
    shutil.rmtree(site / "other_thing-0.1.0.dist-info")
    assert (
        f"{site / name} is not the file that was installed with partitioner: it was removed." in imported(site).stderr
    )


def test_a_module_that_another_adds_does_no_harm(site: Path) -> None:
    (site / "runtime" / "theirs.py").touch()
    record(site, "other_thing", [site / "runtime" / "theirs.py"])
    assert imported(site).stdout == "well\n"


def test_a_working_copy_may_be_edited(site: Path) -> None:
    shutil.rmtree(site / "partitioner-0.1.0.dist-info")
    with (site / "runtime" / "__init__.py").open("a") as file:
        file.write("x = 1\n")
    assert imported(site).stdout == "well\n"
