"""A job over two hosts, which are two network namespaces: it generates what one host does, and a cut link is told.

Ranks of a host are neighbours: tp inside it, stages over both. When the link goes, no connection breaks. Every rank
says whom it misses within the timeout and one second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.two_hosts_rank import PROMPTS, TIMEOUT_S, tiny
from tests.security.jobs.doors import Network, why_no_namespaces

WHY_NOT = why_no_namespaces()
pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
BUSY_S = 2.0
"""What a machine that does much else needs for four processes to be woken and to end."""
HERE = 2
"""Ranks of each host."""
NUM_RANKS = 4
FOR_EVER = 90_000


class Ranks:
    """The process that they are forked from."""

    def __init__(self, network: Network, root: Path, folder: Path) -> None:
        self.network, self._scratch, self._jobs = network, folder, 0
        environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.faults.two_hosts_rank"],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, plan: str, *, new: int, by_slurm: bool = False) -> None:
        self._jobs += 1
        self.folder = self._scratch / str(self._jobs)
        self.folder.mkdir()
        ranks = [
            (self.network.pids[rank // HERE], self._said(rank, by_slurm) | {"GLOO_SOCKET_IFNAME": "eth"})
            for rank in range(NUM_RANKS)
        ]
        self.pids: list[int] = self._ask({"plan": plan, "new": new, "folder": str(self.folder), "ranks": ranks})

    def _said(self, rank: int, by_slurm: bool) -> dict[str, str]:
        host, place = divmod(rank, HERE)
        first, second = self.network.addresses
        if by_slurm:
            said: dict[str, object] = {
                "SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": NUM_RANKS, "SLURM_LOCALID": place, "SLURM_NODEID": host,
                "SLURM_STEP_TASKS_PER_NODE": f"{HERE}(x2)", "SLURM_STEP_NODELIST": f"{first},{second}",
                "SLURM_JOB_ID": self._jobs,
            }  # fmt: skip
        else:
            said = {
                "RANK": rank, "WORLD_SIZE": NUM_RANKS, "LOCAL_RANK": place, "LOCAL_WORLD_SIZE": HERE,
                "GROUP_RANK": host, "MASTER_ADDR": first, "MASTER_PORT": 29_600 + self._jobs,
            }  # fmt: skip
        return {name: str(value) for name, value in said.items()}

    def wait_until_it_generates(self) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("ready-*"))) < NUM_RANKS:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def ends(self, *, wait_s: float = 60) -> list[tuple[float, int]]:
        return [(when, code) for when, code in self._ask({"wait_s": wait_s})]

    def said(self) -> list[str]:
        return [(self.folder / f"said-{rank}").read_text() for rank in range(NUM_RANKS)]

    def tokens(self, rank: int) -> Any:
        return json.loads((self.folder / f"tokens-{rank}").read_text())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Ranks]:
    with Network(2) as network:
        ranks = Ranks(network, pytestconfig.rootpath, tmp_path_factory.mktemp("ranks"))
        yield ranks
        ranks.close()


def expected(new: int) -> list[list[int]]:
    return [list(step.tokens) for step in tiny("tp=1").stream(PROMPTS, max_new_tokens=new)]  # type: ignore[misc]


def require_all_well(ranks: Ranks) -> None:
    assert [code for _, code in ranks.ends()] == [0] * NUM_RANKS, ranks.said()


def test_stages_over_two_hosts_by_slurms_variables(ranks: Ranks) -> None:
    ranks.start("tp=2,pp=2", new=12, by_slurm=True)
    require_all_well(ranks)
    assert [ranks.tokens(rank) for rank in range(NUM_RANKS)] == [expected(12)] * NUM_RANKS
    assert not any("are on 2 hosts" in said for said in ranks.said()), "tp stays inside"


def test_replicas_on_a_host_each(ranks: Ranks) -> None:
    """The second one's ranks find each other on their own host, and its results come over the launcher's store."""
    ranks.start("dp=2,tp=2", new=12)
    require_all_well(ranks)
    assert [ranks.tokens(rank) for rank in range(NUM_RANKS)] == [expected(12)] * NUM_RANKS


def test_replicas_over_both_hosts(ranks: Ranks) -> None:
    """The store of the first stays open until the last has come."""
    ranks.start("dp=4", new=6)
    require_all_well(ranks)
    assert [ranks.tokens(rank) for rank in range(NUM_RANKS)] == [expected(6)] * NUM_RANKS


def test_tp_over_two_hosts_is_told_with_its_price(ranks: Ranks) -> None:
    ranks.start("tp=4", new=6)
    require_all_well(ranks)
    said = ranks.said()
    # two per layer, the embedding's, and the logits'
    assert "the 4 ranks along 'tp' are on 2 hosts: a step has 6 collectives there, each of which takes" in said[0]
    assert "Keep tp inside a host: tp=2,pp=2 has as many ranks" in said[0]
    assert not any("are on 2 hosts" in other for other in said[1:])
    assert ranks.tokens(0) == expected(6)


def cut_in_the_middle(ranks: Ranks) -> list[tuple[float, int, str]]:
    """Of each rank, how long after the link was cut it ended, its exit status, and the line that says why."""
    ranks.start("tp=2,pp=2", new=FOR_EVER)
    ranks.wait_until_it_generates()
    time.sleep(TIMEOUT_S + 1)
    assert all(Path(f"/proc/{pid}").exists() for pid in ranks.pids), "the control: nothing is wrong yet"
    assert not any("RankLost" in said for said in ranks.said())
    cut = time.monotonic()
    ranks.network.cut(1)
    ends = ranks.ends(wait_s=30)
    said = [text[text.find("RankLost: ") :].partition("\n")[0] for text in ranks.said()]
    return [(when - cut, code, line) for (when, code), line in zip(ends, said, strict=True)]


def test_a_link_that_holds_loses_nobody_and_a_cut_one_is_told_by_all(ranks: Ranks) -> None:
    found = cut_in_the_middle(ranks)
    for rank, (seconds, _, line) in enumerate(found):
        print(f"\nrank {rank} after {seconds:.2f} s: {line}", end=" ")
    assert [code for _, code, _ in found] == [1] * NUM_RANKS
    for rank, (seconds, _, line) in enumerate(found):
        # those of the other host; of the first, rank 0, through whom the others are heard
        others = ("rank 0 (stage 0)",) if rank >= HERE else ("2 (stage 1)", "3 (stage 1)")
        assert any(other in line for other in others), line
        assert "its host cannot be reached" in line
        assert seconds < TIMEOUT_S + 1 + BUSY_S, line
