"""Every primitive over the GPUs' own memory, on as many GPUs as there are, against what torch computes."""

import pytest
import torch

from runtime.processes.launch import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.mark.parametrize("case", ["sums", "pieces", "in_graphs", "many_calls"])
def test_primitives(case: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.gpu.peer_rank", case], num_ranks=torch.cuda.device_count(), timeout_s=180)
