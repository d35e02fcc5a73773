"""Launched ranks of dp that share out experts: requests go to each of them, and a rank that is lost ends all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import partitioner
from partitioner import CacheSize, Plan, RankLost, partition
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import mixed
from tests.support import zoo

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.mark.parametrize("plan", ["ep=2", "tp=2,ep=4", "pp=2,ep=2", "sp=2,ep=4"])
def test_each_gets_its_own_until_one_is_lost(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    model = zoo.tiny("mixtral")[0].double()
    cases = mixed(12, longest=40, new=8)
    alone = many_requests.alone(partition(model, Plan()), cases)
    partition(model, Plan.parse(plan)).save(tmp_path / "bundle")
    size = CacheSize(max_batch=6, max_length=60, prefill_step=8)
    with partitioner.launch(tmp_path / "bundle", cache=size, timeout_s=30) as llm:
        assert llm.replicas == 1
        futures = [llm.submit([case.prompt], **case.options)[0] for case in cases]
        assert [future.result(120) for future in futures] == alone
        status = llm.status()
        assert (status.running, status.waiting) == (0, 0)
        future = llm.submit([[5, 6, 7]], max_new_tokens=110, eos_token_id=[])[0]
        os.kill(llm.pids[0][1], signal.SIGKILL)
        with pytest.raises(RankLost, match="rank 1"):
            future.result(60)
