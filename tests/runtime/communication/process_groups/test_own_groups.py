"""Two communicators at a time, in programs that have process groups of their own and in those that have none."""

from pathlib import Path

import pytest
import torch

from runtime.processes.launch import launch

pytestmark = pytest.mark.processes


@pytest.mark.parametrize("own", ["with a default group", "without one"])
@pytest.mark.parametrize("first", ["four", "two"])
def test_ours_come_and_go_without_anybody_elses(own: str, first: str, tmp_path: Path) -> None:
    launch(
        ["tests.runtime.communication.process_groups.own_group_ranks", "cpu", str(tmp_path), own, first],
        num_ranks=4,
        timeout_s=60,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("own", ["with a default group", "without one"])
@pytest.mark.parametrize("first", ["four", "two"])
def test_over_nccl(own: str, first: str, tmp_path: Path) -> None:
    command = ["tests.runtime.communication.process_groups.own_group_ranks", "cuda", str(tmp_path), own, first]
    launch(command, num_ranks=4, timeout_s=200)
