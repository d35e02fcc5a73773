"""Experts over several ranks: real processes over gloo, and bundles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import partitioner
from partitioner import Plan, partition
from runtime.processes.launch import launch
from tests.support import zoo

PLANS = (
    "ep=2",
    "ep=2,expert-parallel.exchange=exchange",
    "tp=2,ep=2,expert-parallel.exchange=exchange,sequence-parallel",
)


def test_processes_over_gloo(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.equivalence.expert_rank", "mixtral", *PLANS], num_ranks=2, timeout_s=300)


@pytest.mark.parametrize("plan", ["ep=3", "ep=2,expert-parallel.exchange=exchange", PLANS[-1]])
def test_bundles_hold_what_ranks_run(plan: str, tmp_path: Path) -> None:
    model, ids = zoo.tiny("mixtral")
    parts = partition(model, Plan.parse(plan))
    parts.save(tmp_path / "bundle")
    bundle = partitioner.load(tmp_path / "bundle")
    bundle.verify()
    ids = ids[:, :9]
    assert torch.equal(bundle.simulate(input_ids=ids), parts.simulate(input_ids=ids))
    assert torch.equal(bundle.generate(ids, max_new_tokens=3), parts.generate(ids, max_new_tokens=3))


def test_a_bundle_is_dealt_out_anew(tmp_path: Path) -> None:
    model, ids = zoo.tiny("mixtral")
    expected = partition(model, Plan()).simulate(input_ids=ids[:, :5])
    partition(model, Plan(ep=3)).save(tmp_path / "bundle")
    for plan in ("ep=2", "tp=2", "tp=2,ep=2"):
        found = partition(tmp_path / "bundle", Plan.parse(plan)).simulate(input_ids=ids[:, :5])
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9), plan
