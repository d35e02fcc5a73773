"""Pipeline stages and replicas in processes of their own, over gloo."""

from __future__ import annotations

import pytest

from partitioner.errors import RankLost
from runtime.processes.launch import launch


@pytest.mark.processes
@pytest.mark.parametrize(
    ("plan", "num_ranks", "name"),
    [
        pytest.param("pp=2", 2, "llama", marks=pytest.mark.slow),
        pytest.param("pp=3", 3, "llama", marks=pytest.mark.slow),
        pytest.param("tp=2,pp=2", 4, "llama", marks=pytest.mark.slow),
        pytest.param("pp=2,sp=2", 4, "llama", marks=pytest.mark.slow),
        pytest.param("pp=2,pipeline.share_head=true", 2, "gpt2", marks=pytest.mark.slow),
        pytest.param("pp=3,pipeline.share_head=true", 3, "llama", marks=pytest.mark.slow),
        pytest.param("tp=2,pp=2,pipeline.share_head=true", 4, "llama", marks=pytest.mark.slow),
        pytest.param("pp=2,sp=2,tp=2,ep=4", 8, "mixtral", marks=pytest.mark.slow),  # all axes
    ],
)
def test_stages_over_gloo(
    plan: str, num_ranks: int, name: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.equivalence.ranks.staged_rank", plan, name], num_ranks=num_ranks, timeout_s=600)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("plan", "num_ranks"), [("dp=2", 2), ("dp=2,pp=2", 4)])
def test_replicas_under_one_launcher(
    plan: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.equivalence.ranks.replica_rank", plan, "none"], num_ranks=num_ranks, timeout_s=600)


@pytest.mark.slow
@pytest.mark.processes
def test_a_replica_that_fails_under_one_launcher_ends_all(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, capfd: pytest.CaptureFixture[str]
) -> None:
    """What only our own launcher can keep up: torchrun's agent ends all."""
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    with pytest.raises(RankLost, match="ended with exit code 1"):
        launch(["tests.equivalence.ranks.replica_rank", "dp=2,pp=2", "raise"], num_ranks=4, timeout_s=600)
