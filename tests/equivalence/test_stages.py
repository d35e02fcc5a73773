"""Pipeline stages and replicas in processes of their own."""

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
def test_stages_between_processes(
    plan: str, num_ranks: int, name: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.equivalence.ranks.staged_rank", plan, name], num_ranks=num_ranks, timeout_s=600)


FAMILIES = (
    "gpt2",  # tied tables, learnt positions
    "bloom",  # biases that grow with the distance
    "opt",
    "gemma3_text",  # windows, norms before and behind
    "cohere2",  # attention and feed-forward side by side
    "gpt_oss",  # sinks, windows, routed experts with biases
    "qwen3_moe",
    "deepseek_v3",  # latent keys and values, shared and routed experts
    "bart",  # the decoder alone
    "mamba2",  # states only
    "falcon_h1",  # states beside attention
    "qwen3_next",  # delta rules, gated attention, experts
    "lfm2",  # convolutions
)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_dozen_families_over_stages(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["tests.equivalence.ranks.staged_rank", f"pp={num_ranks}", *FAMILIES]
    launch(arguments, num_ranks=num_ranks, timeout_s=3000)


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
