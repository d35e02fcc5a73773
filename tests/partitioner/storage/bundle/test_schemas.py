"""Bundles as earlier versions wrote them: today's code reads them, and gets what was got then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import partitioner
from partitioner import BundleError, Plan, partition
from partitioner.storage.bundle.format.manifest import SCHEMA
from tests.support.bundle_forger import Forger, use

HERE = Path(__file__).parent / "schemas"


def folders() -> list[Path]:
    return sorted(HERE.glob("schema_*"))


def test_every_schema_has_its_folder() -> None:
    assert [folder.name for folder in folders()] == [f"schema_{n}" for n in range(1, SCHEMA + 1)]


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_it_is_read(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    bundle = partitioner.load(folder / "bundle")
    assert f"schema_{json.loads((folder / 'bundle/manifest.json').read_text())['schema']}" == folder.name
    bundle.verify()
    ids = torch.tensor(expected["input_ids"])
    # another processor may round differently
    torch.testing.assert_close(bundle.simulate(input_ids=ids), torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-5)
    found = bundle.generate(ids, max_new_tokens=len(expected["tokens"][0]) - ids.shape[1])
    assert torch.equal(found, torch.tensor(expected["tokens"]))


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_it_is_split_anew(folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    logits = partition(folder / "bundle", Plan(tp=1)).simulate(input_ids=torch.tensor(expected["input_ids"]))
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-5)


def test_a_change_is_noticed(tmp_path: Path) -> None:
    """The negative control: another weight gives other logits."""
    folder = Path(shutil.copytree(HERE / "schema_1/bundle", tmp_path / "bundle"))
    before = use(folder)[0]
    with Forger(folder).node("torch.silu") as node:
        node["op"] = "torch.tanh"
    with pytest.raises(AssertionError):
        torch.testing.assert_close(use(folder)[0], before, rtol=1e-4, atol=1e-5)
    with Forger(folder).manifest() as data:
        data["schema"] = SCHEMA + 1
    with pytest.raises(BundleError, match="update it"):
        use(folder)
