"""torchrun over two hosts, which are two network namespaces: both its rendezvous, and a link that is cut.

The lines of docs/parallelism/multi_node.md with 2 ranks per host. When a rank ends with an error, torchrun's agent ends
the others of its host at once: so of each host one rank at least says in time whom it misses, and then all go.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.test_two_hosts import BUSY_S, FOR_EVER, HERE, NUM_RANKS, WHY_NOT, expected
from tests.faults.two_hosts_rank import TIMEOUT_S
from tests.security.jobs.doors import Network, go_to

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
PLAN = "tp=2,pp=2"
START_S = 400.0
"""Six processes import torch; a machine may have much else to do."""
CLEARED_S = 60.0
"""The same of four that have said what they miss, and clear away torch and the model."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(2) as network:
        yield network


class Job:
    """One torchrun per host, with the ranks that they start."""

    def __init__(self, network: Network, root: Path, folder: Path, rendezvous: str, *, port: int, new: int) -> None:
        self.folder = folder
        self.agents: list[subprocess.Popen[bytes]] = []
        environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for host, (pid, address) in enumerate(zip(network.pids, network.addresses, strict=True)):
            first = network.addresses[0]
            meeting = {
                "static": ["--node-rank", str(host), "--master-addr", first, "--master-port", str(port)],
                # the names of two hosts on one machine are the same, so that torchrun cannot tell which one is meant
                "c10d": ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"{first}:{port}",
                         "--rdzv-conf", f"is_host={int(host == 0)}", "--local-addr", address],
            }[rendezvous]  # fmt: skip
            size = ["--nnodes", "2", "--nproc-per-node", str(HERE), "--max-restarts", "0"]
            rank = ["-m", "tests.faults.torchrun_rank", PLAN, str(new), str(folder)]
            with (folder / f"agent-{host}").open("wb") as said:
                self.agents.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "torch.distributed.run", *size, *meeting, *rank],
                        env={**os.environ, **environment, "GLOO_SOCKET_IFNAME": "eth"},
                        stdout=said,
                        stderr=said,
                        preexec_fn=functools.partial(go_to, pid),
                        start_new_session=True,
                    )
                )

    def said(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("agent-*")))

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + START_S
        while len(list(self.folder.glob(f"{name}-*"))) < NUM_RANKS:
            assert time.monotonic() < deadline, self.said()
            assert all(agent.poll() in (None, 0) for agent in self.agents), self.said()
            time.sleep(0.05)

    def lost(self) -> dict[int, tuple[float, str]]:
        return {int(path.name[5:]): tuple(json.loads(path.read_text())) for path in self.folder.glob("lost-*")}

    def ranks_left(self) -> list[str]:
        pids = [path.read_text() for path in self.folder.glob("come-*")]
        return [pid for pid in pids if _is_running(pid)]

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                agent.kill()
            agent.wait()


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("rendezvous", "port"), [("static", 29_701), ("c10d", 29_702)])
def test_a_job_of_torchrun_says_what_one_host_does(
    rendezvous: str, port: int, network: Network, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    job = Job(network, pytestconfig.rootpath, tmp_path, rendezvous, port=port, new=12)
    try:
        job.wait_for("tokens")
        assert [agent.wait(START_S) for agent in job.agents] == [0, 0], job.said()
    finally:
        job.close()
    for rank in range(NUM_RANKS):
        assert json.loads((tmp_path / f"tokens-{rank}").read_text()) == expected(12)


@pytest.mark.parametrize(("rendezvous", "port"), [("static", 29_703), ("c10d", 29_704)])
def test_a_cut_link_is_told_on_both_hosts_and_leaves_no_rank(
    rendezvous: str, port: int, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    with Network(2) as network:
        job = Job(network, pytestconfig.rootpath, tmp_path, rendezvous, port=port, new=FOR_EVER)
        try:
            job.wait_for("ready")
            time.sleep(TIMEOUT_S + 1)
            assert len(job.ranks_left()) == NUM_RANKS, "the control: nothing is wrong yet"
            assert not job.lost()
            cut = time.monotonic()
            network.cut(1)
            deadline = cut + TIMEOUT_S + 1 + BUSY_S + CLEARED_S
            while job.ranks_left() and time.monotonic() < deadline:
                time.sleep(0.02)
            gone, left = time.monotonic() - cut, job.ranks_left()
            found = job.lost()
        finally:
            job.close()
    for rank, (when, line) in sorted(found.items()):
        print(f"\n{rendezvous}: rank {rank} after {when - cut:.2f} s: {line}", end=" ")
    print(f"\n{rendezvous}: the last rank was gone after {gone:.2f} s", end=" ")
    assert not left
    assert {rank // HERE for rank in found} == {0, 1}, job.said()
    for rank, (when, line) in found.items():
        assert when - cut < TIMEOUT_S + 1 + BUSY_S, line
        others = ("rank 0 (stage 0)",) if rank >= HERE else ("2 (stage 1)", "3 (stage 1)")
        assert any(other in line for other in others), line
        assert "its host cannot be reached" in line
