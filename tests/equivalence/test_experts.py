"""Experts over several ranks: real processes over gloo, and bundles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import partitioner
from partitioner import Plan, partition
from partitioner.compile.partition import compile_program
from runtime.processes.launch import launch
from tests.support import generated, zoo
from tests.support.partitioned import EXACT, compiled_for, error, traced

PLANS = (
    "ep=2",
    "ep=2,expert-parallel.exchange=exchange",
    "tp=2,ep=2,expert-parallel.exchange=exchange,sequence-parallel",
)


@pytest.mark.slow
@pytest.mark.processes
def test_processes_over_gloo(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.equivalence.ranks.expert_rank", "mixtral", *PLANS], num_ranks=2, timeout_s=300)


@pytest.mark.slow
@pytest.mark.parametrize("checks", [["--always"], []])
@pytest.mark.parametrize(
    ("ranks", "plans"), [(2, [*PLANS, "ep=2,expert-parallel.exchange=gather"]), (4, ["tp=2,ep=4", "ep=4"])]
)
def test_more_processes_over_gloo(
    ranks: int, plans: list[str], checks: list[str], monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.equivalence.ranks.expert_rank", *checks, "mixtral", *plans], num_ranks=ranks, timeout_s=300)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param("pp=2,ep=2", marks=pytest.mark.slow),
        pytest.param("pp=2,tp=2,ep=2,expert-parallel.exchange=exchange", marks=pytest.mark.slow),
        "pp=2,tp=2,ep=2,sequence-parallel",
    ],
)
def test_stages_with_experts(plan: str) -> None:
    parts = compiled_for("mixtral", plan)
    assert error("mixtral", parts, 6) < EXACT
    assert generated.error("mixtral", parts, generated.prompts("mixtral", (1, 7)), new=3) < 1e-9


_MESHES = st.tuples(
    *(st.sampled_from((1, 2, 3)) for _ in range(3)), st.sampled_from((1, 2)), st.booleans(), st.booleans()
)


@pytest.mark.slow
@given(_MESHES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_mesh(case: tuple[int, int, int, int, bool, bool]) -> None:
    dp, tp, ep, etp, exchanged, rows = case
    assume(ep * etp > 1 and (dp * tp) % (ep * etp) == 0)
    passes = [("expert-parallel", {"exchange": "exchange" if exchanged else "replicate"})]
    plan = Plan(dp=dp, tp=tp, ep=ep, etp=etp, passes=[*passes, *(["sequence-parallel"] if rows else [])])
    assert error("mixtral", compile_program(traced("mixtral")[1], plan), 5) < EXACT


@pytest.mark.parametrize(
    "plan",
    [
        "ep=3",
        *(pytest.param(plan, marks=pytest.mark.slow) for plan in ("ep=2,expert-parallel.exchange=exchange", PLANS[-1])),
    ],
)
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
