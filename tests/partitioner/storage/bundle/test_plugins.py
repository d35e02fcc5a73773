"""Ops of other packages: in a bundle by the name that they are declared under, and refused where they are not."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import partitioner
from partitioner import BundleError, Plan, WeightError, partition
from partitioner.storage.bundle.format.op_names import _plugin_op
from tests.support.bundle_forger import IDS, tiny_model
from tests.support.plugins import EXAMPLE

PLAN = Plan(tp=2, passes=("int8-weights",))


def install(site: Path, name: str, entries: dict[str, dict[str, str]]) -> None:
    """What an installer leaves of a distribution's entry points."""
    info = site / f"{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


def declared() -> dict[str, Any]:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(project["entry-points"])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    _plugin_op.cache_clear()
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield tmp_path / "site"
    _plugin_op.cache_clear()


@pytest.fixture
def saved(site: Path, tmp_path: Path) -> Path:
    install(site, "int8_weights", declared())
    partition(tiny_model(), PLAN).save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_where_it_is_installed(saved: Path) -> None:
    parts, bundle = partition(tiny_model(), PLAN), partitioner.load(saved)
    bundle.verify()
    assert torch.equal(bundle.simulate(input_ids=IDS), parts.simulate(input_ids=IDS))
    assert torch.equal(bundle.generate(IDS, max_new_tokens=4), parts.generate(IDS, max_new_tokens=4))
    # what the plugin makes is stored as it was made
    assert {str(each.shard.dtype) for each in bundle.stored(0) if each.shard.source == "made"} == {
        "torch.int8", "torch.float32"
    }  # fmt: skip


def test_where_it_is_not(saved: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
    _plugin_op.cache_clear()
    bundle = partitioner.load(saved)
    assert "int8" in bundle.report
    with pytest.raises(BundleError, match="'int8_linear' is needed, and no package that is installed declares it"):
        bundle.simulate(input_ids=IDS)


def test_declared_twice(saved: Path, site: Path) -> None:
    install(site, "other", {"partitioner.ops": {"int8_linear": "os:system"}})
    _plugin_op.cache_clear()
    with pytest.raises(BundleError, match="several packages that are installed declare it"):
        partitioner.load(saved).simulate(input_ids=IDS)


def test_what_cannot_be_imported(saved: Path, site: Path) -> None:
    (site / "int8_weights-0.1.dist-info/entry_points.txt").write_text("[partitioner.ops]\nint8_linear = no.such:op\n")
    _plugin_op.cache_clear()
    with pytest.raises(BundleError, match=r"'int8_linear' \(no.such:op\) cannot be loaded: ModuleNotFoundError"):
        partitioner.load(saved).simulate(input_ids=IDS)


def test_an_op_that_is_not_declared_is_not_saved(site: Path, tmp_path: Path) -> None:
    install(site, "int8_weights", {"partitioner.passes": declared()["partitioner.passes"]})
    with pytest.raises(BundleError, match=r"cannot hold .*int8_linear.*an entry point of the group 'partitioner.ops'"):
        partition(tiny_model(), PLAN).save(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_made_weights_are_not_split_anew(saved: Path) -> None:
    """The weights that they were made of are gone."""
    with pytest.raises(WeightError, match="holds nothing of the weight"):
        partition(saved, Plan(tp=1))
