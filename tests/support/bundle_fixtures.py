"""A valid bundle, and a copy of it to spoil."""

import shutil
from pathlib import Path

import pytest

from tests.support.bundle_forger import save_tiny


@pytest.fixture(scope="session")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("valid") / "bundle"
    save_tiny(folder)
    return folder


@pytest.fixture
def folder(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "bundle"))
