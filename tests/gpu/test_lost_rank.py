"""Where the others wait on the device: they end with the lost rank's name within the timeout and 1 s."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.processes.free_port import free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TIMEOUT_S = 10
SLACK_S = 0.5  # of a loaded machine


def run(pytestconfig: pytest.Config, folder: Path, case: list[str]) -> tuple[list[int], list[str], list[float]]:
    """Exit codes, errors, and when each of two ranks ended, in seconds after the fault; nobody supervises them."""
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"PYTHONPATH": str(pytestconfig.rootpath), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "tests.gpu.nccl_rank", case[0], str(folder), *case[1:]]
        with (folder / f"stderr-{rank}").open("wb") as stderr:
            processes.append(subprocess.Popen(command, env=environment, stderr=stderr))
    ended: dict[int, float] = {}
    stopped = {int(case[3])} if case[1:2] in (["stop"], ["hang"]) else set()
    deadline = time.monotonic() + 180
    try:
        while len(ended.keys() | stopped) < 2 and time.monotonic() < deadline:
            ended |= {r: time.time() for r, each in enumerate(processes) if r not in ended and each.poll() is not None}
            time.sleep(0.01)
    finally:
        for each in processes:
            each.kill()
            each.wait()
    texts = [(folder / f"stderr-{rank}").read_text(errors="replace") for rank in range(2)]
    assert (folder / "when").exists(), texts  # none has come as far as the fault
    since = float(json.loads((folder / "when").read_text()))
    return [each.returncode for each in processes], texts, [ended.get(r, float("inf")) - since for r in range(2)]


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("carrier", ["nccl", pytest.param("peer memory", marks=two_gpus)])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("fault", ["kill", "raise", "stop"])
def test_the_other_says_who_is_lost(
    fault: str, phase: str, victim: int, carrier: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    codes, texts, seconds = run(pytestconfig, tmp_path, ["fault", fault, phase, str(victim), carrier])
    other = 1 - victim
    said = {"kill": "lost: its process ended", "raise": "failed: ValueError: a fault of its own"}
    print(f"{fault} of {victim}, {phase}: the other ended after {seconds[other]:.2f} s, with {codes[other]}")
    assert codes[other] != 0
    assert "RankLost: " in texts[other], texts[other]
    assert f"rank {victim} {said.get(fault, '')}" in texts[other], texts[other]
    # an end is told by the connection, at once; only a stopped process takes the timeout
    assert seconds[other] < (TIMEOUT_S if fault == "stop" else 0) + 1 + SLACK_S
    assert codes[victim] == {"kill": -signal.SIGKILL, "stop": -signal.SIGKILL}.get(fault, 1)


@pytest.mark.parametrize("carrier", ["nccl", pytest.param("peer memory", marks=two_gpus)])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_rank_that_lives_and_does_not_come_is_named(
    carrier: str, phase: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """By the comparison before it, or by the kernels of the GPUs' own memory, which tell the host."""
    codes, texts, seconds = run(pytestconfig, tmp_path, ["fault", "hang", phase, "1", carrier])
    assert codes[0] != 0
    assert seconds[0] < TIMEOUT_S + 1 + SLACK_S, texts[0]
    if carrier == "nccl" and phase == "decode":  # compared no more: NCCL names nobody
        assert "Watchdog caught collective operation timeout" in texts[0], texts[0]
        return
    assert re.search(f"rank 1 did not (come|answer) within {TIMEOUT_S} s; its process is alive", texts[0]), texts[0]


def test_captured_graphs_are_gone_before_their_groups(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Destroying a group waits, or crashes, where a graph with its collectives is still there."""
    codes, texts, seconds = run(pytestconfig, tmp_path, ["graph_then_error"])
    assert codes == [1, 1], texts
    assert "ValueError: after the graphs" in texts[0]
    assert max(seconds) < 8  # CUDA and NCCL are cleared away, which takes seconds
