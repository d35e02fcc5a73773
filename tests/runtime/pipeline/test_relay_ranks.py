"""Captured stages in processes of their own: the tokens of one rank, and an end to everything that is under way."""

import pytest
import torch

from runtime.processes.launch import launch


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("plan", "ranks"), [("pp=2", 2), ("pp=3", 3), ("tp=2,pp=2", 4), ("pp=3,pipeline.share_head=true", 3)]
)
@pytest.mark.parametrize("sharing", ["on", "off"])
def test_on_cpus(
    plan: str, ranks: int, sharing: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.pipeline.relay_rank", plan, "cpu", sharing], num_ranks=ranks, timeout_s=400)


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("plan", ["pp=2", "pp=2,pipeline.share_head=true"])
def test_over_nccl(plan: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.pipeline.relay_rank", plan, "cuda", "off"], num_ranks=2, timeout_s=300)
