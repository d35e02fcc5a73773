"""Captured steps of several processes: the tokens of one rank, and an end to everything that is under way."""

import pytest
import torch

from runtime.processes.launch import launch


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "plan", "ranks"),
    [
        ("llama", "pp=2", 2),
        ("llama", "pp=3", 3),
        ("llama", "tp=2,pp=2", 4),
        ("llama", "pp=3,pipeline.share_head=true", 3),
        ("qwen3_moe", "ep=2", 2),
        ("qwen3_moe", "tp=2,ep=4", 4),
    ],
)
@pytest.mark.parametrize("sharing", ["on", "off"])
def test_on_cpus(
    name: str, plan: str, ranks: int, sharing: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.pipeline.relay_rank", name, plan, "cpu", sharing], num_ranks=ranks, timeout_s=400)


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "plan"), [("llama", "pp=2"), ("llama", "pp=2,pipeline.share_head=true"), ("qwen3_moe", "ep=2")]
)
def test_over_nccl(name: str, plan: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.pipeline.relay_rank", name, plan, "cuda", "off"], num_ranks=2, timeout_s=300)
