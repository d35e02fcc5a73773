"""Process groups over gloo; one start of three processes serves all cases that leave them alive."""

import pytest
import torch

from partitioner.errors import CommunicationError, PlanError, RankLost
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.processes.launch import launch

ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.processes
@pytest.mark.slow  # over gloo: test_all_axes.py, and tests/faults/test_lost_rank.py
@pytest.mark.parametrize("sharing", ["on", "off"])
def test_three_processes(sharing: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.communication.process_groups.three_processes", "cpu", sharing], num_ranks=3, timeout_s=60)


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_three_processes_over_nccl(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.communication.process_groups.three_processes", "cuda", "auto"], num_ranks=3, timeout_s=240)


def test_the_wrong_number_of_processes_is_refused_before_joining(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PlanError, match=r"the plan \(tp 2\) needs 2 processes, got 1: .*--nproc-per-node 2"):
        ProcessGroups.connect(Mesh.of(tp=2))


@pytest.mark.processes
def test_one_process_meets_nobody(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.communication.process_groups.one_process"], num_ranks=1, timeout_s=30)


def test_outside_torchrun_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CommunicationError, match="not started by torchrun: RANK, WORLD_SIZE"):
        ProcessGroups.connect(Mesh.of(tp=2))


def test_ranks_that_never_come_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankLost, match="rank 0 could not meet the others within 1 s"):
        ProcessGroups.connect(Mesh.of(tp=2), timeout_s=1)
    assert not torch.distributed.is_initialized()
