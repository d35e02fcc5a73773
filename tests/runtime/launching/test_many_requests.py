"""Many requests at once over launched ranks: each gets its own tokens, whatever else comes, goes, or is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

import partitioner
from partitioner import CacheSize, Plan, RankLost
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import Case, mixed
from tests.support.partitioned import compiled

pytestmark = [pytest.mark.processes, pytest.mark.slow]
SIZE = CacheSize(max_batch=6, max_length=60, prefill_step=32)


@pytest.fixture(scope="module")
def cases() -> tuple[list[Case], list[list[int]]]:
    found = mixed(64, longest=200, new=30)
    return found, many_requests.alone(compiled("llama", 1), found)


def launched(plan: str, tmp_path: Any, patch: pytest.MonkeyPatch, root: Any) -> Any:
    patch.setenv("PYTHONPATH", str(root))
    given = Plan.parse(plan)
    return partitioner.launch(saved(tmp_path, given), given, cache=SIZE, timeout_s=30)


def saved(tmp_path: Any, plan: Plan) -> Any:
    """A model in memory is written to a bundle; one that was lifted to float64 is written as it is."""
    from partitioner import partition
    from tests.support import zoo

    model = zoo.tiny("llama")[0].double()
    partition(model, Plan(tp=plan.tp, pp=plan.pp)).save(tmp_path / "bundle")
    return tmp_path / "bundle"


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def told(future: Future[list[int]], seconds: float = 120) -> list[int] | None:
    """None: it was cancelled."""
    with contextlib.suppress(CancelledError):
        return future.result(seconds)
    return None


@pytest.mark.parametrize("plan", ["dp=2,tp=2", "dp=2"])
def test_each_gets_its_own(
    plan: str, cases: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    asked, alone = cases
    draw = random.Random(1)
    with launched(plan, tmp_path, monkeypatch, pytestconfig.rootpath) as llm:
        futures = [llm.submit([case.prompt], **case.options)[0] for case in asked]
        wait_until(lambda: all(each.running for each in llm.status().replicas))
        cancelled = {number for number in range(64) if draw.random() < 0.1 and futures[number].cancel()}
        for number, future in enumerate(futures):
            found = told(future)
            assert found is None if number in cancelled else found == alone[number], f"request {number}"
        status = llm.status()
        assert (status.running, status.waiting, status.is_lost) == (0, 0, False)
        assert all(each.prefill_tokens > 0 for each in status.replicas), "both had something to do"
        # a client that goes away
        stream = llm.stream([[5, 6, 7]], max_new_tokens=100, eos_token_id=[])
        next(stream)
        stream.close()
        wait_until(lambda: not llm.status().running)
        # and a rank that is killed while all are busy
        futures = [llm.submit([case.prompt], **case.options)[0] for case in asked]
        # the first of many, of which some wait: each replica has rows that it will not finish
        wait_until(lambda: all(each.running and each.waiting for each in llm.status().replicas))
        os.kill(llm.pids[1][-1], signal.SIGKILL)
        lost = 0
        for number, future in enumerate(futures):
            try:
                assert told(future) == alone[number]
            except RankLost:
                lost += 1
        assert list(llm.lost) == [1]
        assert 0 < lost < 64
        assert "SIGKILL" in str(llm.status().replicas[1].lost)
        assert llm.submit([asked[3].prompt], **asked[3].options)[0].result(60) == alone[3]
