"""`partitioner.launch`: ranks in processes of their own, served from this one, and what becomes of them.

One pair of replicas serves the tests in order; the last of them lose one replica, then both.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import partitioner
from partitioner import InputError, Plan, PlanError, RankLost, partition
from partitioner.errors import CommunicationError, WeightError
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.generation.generation_request import Generated
from runtime.launching.launched import Launched
from tests.security.jobs.doors import knock, listening
from tests.support import zoo
from tests.support.generated import prompts

pytestmark = pytest.mark.processes
LONG = 10**4


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(done: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone() -> Any:
    return partition(zoo.tiny("llama")[0], Plan())


@pytest.fixture(scope="module")
def llm(alone: Any, pytestconfig: pytest.Config) -> Iterator[Launched]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
        launched = partitioner.launch(alone, Plan(dp=2), timeout_s=30)
    pids = [pid for each in launched.pids for pid in each]
    with launched:
        yield launched
    assert all(map(gone, pids))
    assert not launched._supervisor._thread.is_alive()  # type: ignore[union-attr]


def test_rows_come_back_in_order_with_the_tokens_of_one(llm: Launched, alone: Any) -> None:
    texts = prompts("llama", (4, 7, 2, 5, 3))
    for options in (
        {"max_new_tokens": 5},
        {"max_new_tokens": 70, "do_sample": True, "seed": 3},
        {"max_length": 12, "logprobs": True},
    ):
        found, expected = (each.generate(texts, eos_token_id=[], **options) for each in (llm, alone))
        if isinstance(found, Generated):
            torch.testing.assert_close(found.logprobs, expected.logprobs)
            found, expected = found.sequences, expected.sequences
        assert torch.equal(found, expected)
    assert (llm.replicas, llm.mesh.world_size, llm.lost) == (2, 1, {})


def test_nobody_else_can_come_in(llm: Launched) -> None:
    """gloo's ports are there, on loopback, and shut; requests go over sockets without a name."""
    doors = [door for each in llm.pids for pid in each for door in listening(pid)]
    assert {(door.kind, door.address) for door in doors} <= {("tcp", "127.0.0.1")}
    assert [knock(door, b"", is_stranger=False) for door in doors] == [None] * len(doors)


def test_a_stream_that_is_left_frees_its_replicas(llm: Launched, alone: Any) -> None:
    texts = prompts("llama", (4, 7, 2))
    stream = llm.stream(texts, max_new_tokens=LONG, eos_token_id=[])
    steps = [next(stream).tokens for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]
    expected = alone.generate(texts, max_new_tokens=3, eos_token_id=[])[:, -3:]
    assert torch.equal(torch.tensor(steps).t(), expected)
    started = time.monotonic()
    assert torch.equal(llm.generate(texts, max_new_tokens=3, eos_token_id=[])[:, -3:], expected)  # type: ignore[index]
    assert time.monotonic() - started < 20


def test_a_future_per_prompt(llm: Launched, alone: Any) -> None:
    texts = prompts("llama", (4, 7, 2))
    futures = llm.submit(texts, max_new_tokens=4, eos_token_id=[])
    expected = alone.generate(texts, max_new_tokens=4, eos_token_id=[])[:, -4:].tolist()
    assert [future.result(60) for future in futures] == expected


def test_the_same_errors_are_raised_and_nobody_is_lost(llm: Launched, alone: Any) -> None:
    for texts, options in (
        ([[3]], {"max_new_token": 2}),
        ([[3], [10**6]], {"max_new_tokens": 2}),
        ([], {}),
    ):
        with pytest.raises(InputError) as expected:
            alone.generate(texts, **options)
        with pytest.raises(InputError) as raised:
            llm.generate(texts, **options)
        assert str(raised.value) == str(expected.value)
    assert llm.lost == {}


def test_a_lost_replica_is_told_and_the_other_finishes(llm: Launched, caplog: pytest.LogCaptureFixture) -> None:
    texts = prompts("llama", (4, 7))  # one for each replica
    futures = llm.submit(texts, max_new_tokens=400, eos_token_id=[])
    wait_until(lambda: all(any(job.steps for job in each.jobs.values()) for each in llm._supervisor.replicas))
    longest_is_with = 0  # the longest row is dealt first
    with caplog.at_level(logging.WARNING, "partitioner"):
        os.kill(llm.pids[longest_is_with][0], signal.SIGKILL)
        struck = time.monotonic()
        with pytest.raises(RankLost, match="rank 0 of replica 0 was ended by SIGKILL"):
            futures[1].result(30)
        assert time.monotonic() - struck < 1 + 4, "one second, and what a busy machine takes"
    assert len(futures[0].result(60)) == 400
    assert list(llm.lost) == [0]
    assert "replica 0 is lost: rank 0 of replica 0 was ended by SIGKILL" in caplog.text
    assert "1 of 2 replicas go on" in caplog.text
    assert llm.generate(texts, max_new_tokens=2).shape == (2, 9)  # type: ignore[union-attr]


def test_a_stopped_rank_is_lost_after_the_timeout(llm: Launched) -> None:
    for replica in llm._supervisor.replicas:
        replica.timeout_s = 2.0
    pid = llm.pids[1][0]
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    with pytest.raises(RankLost, match="rank 0 of replica 1 gave no sign of life for 2 s"):
        llm.generate([[3, 4]], max_new_tokens=LONG)
    assert 1 < time.monotonic() - stopped < 2 + 1 + 4
    with pytest.raises(RankLost, match=r"no replica is left: rank 0 of replica 0 .* rank 0 of replica 1"):
        llm.generate([[3, 4]], max_new_tokens=2)
    wait_until(lambda: gone(pid))
    llm.close()
    with pytest.raises(CommunicationError, match="have been ended"):
        llm.generate([[3, 4]], max_new_tokens=2)


def test_what_cannot_be_launched_is_refused_before_anything_starts(alone: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="replicas of tp 2, and what is there is divided as one rank"):
        partitioner.launch(alone, Plan(dp=2, tp=2))
    with pytest.raises(InputError, match="is no folder"):
        partitioner.launch(tmp_path / "nothing", Plan(dp=2))
    with pytest.raises(InputError, match="parts or a model; got a int"):
        partitioner.launch(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="too many for this machine"):
        partitioner.launch(alone, Plan(dp=10**4))
    with pytest.raises(InputError, match="max_batch must be at least 1"):
        partitioner.launch(alone, max_batch=0)


@pytest.mark.slow
def test_what_keeps_ranks_from_starting_is_raised_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    zoo.tiny("llama")[0].save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(WeightError, match="cut short"):
        partitioner.launch(tmp_path, Plan(tp=2), timeout_s=60)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,pp=2", "tp=2"])
def test_bundles_and_folders_over_several_ranks(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, alone: Any
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    texts = prompts("llama", (4, 7, 2))
    partition(zoo.tiny("llama")[0], Plan.parse(plan)).save(tmp_path / "bundle")
    expected = alone.generate(texts, max_new_tokens=5, eos_token_id=[])
    with partitioner.launch(tmp_path / "bundle", timeout_s=30, max_batch=1) as llm:
        assert torch.equal(llm.generate(texts, max_new_tokens=5, eos_token_id=[]), expected)
        if "dp" in plan:
            os.kill(llm.pids[1][1], signal.SIGSTOP)
            llm._supervisor.replicas[1].timeout_s = 2.0
            with pytest.raises(RankLost, match=r"rank 1 of replica 1 \(stage 1\)"):
                llm.generate(texts, max_new_tokens=50, eos_token_id=[])
    with partitioner.launch(EXAMPLE_MODEL, Plan.parse(plan), dtype=torch.float64) as llm:
        own = partition(EXAMPLE_MODEL, Plan(), dtype=torch.float64)
        given = [[3, 4, 5], [6, 7]]
        assert torch.equal(llm.generate(given, max_new_tokens=4), own.generate(given, max_new_tokens=4))


CODE = """
import sys, threading, partitioner, torch
from partitioner import Plan, partition
from tests.support import zoo
llm = partitioner.launch(partition(zoo.tiny("llama")[0], Plan(dp=2)))
print(*[pid for each in llm.pids for pid in each], flush=True)
{what}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("llm.generate([[3, 4], [5]], max_new_tokens=10**6)", signal.SIGKILL),
        ("llm.generate([[3, 4], [5]], max_new_tokens=10**6)", signal.SIGINT),
        ("llm.generate([[3, 4], [5]], max_new_tokens=10**6)", signal.SIGTERM),
        ("with llm: raise ValueError", None),
        ("llm.submit([[3, 4], [5]], max_new_tokens=10**6)", None),  # and forgets it
    ],
    ids=["killed", "interrupted", "terminated", "exception", "forgotten"],
)
def test_nothing_outlives_its_process(
    what: str, number: signal.Signals | None, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath), "TMPDIR": str(tmp_path)}
    code = CODE.format(what=what)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        env={**environment, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path.parent / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pids = [int(each) for each in process.stdout.readline().split()]
    assert len(pids) == 2
    if number is not None:
        time.sleep(1)
        process.send_signal(number)
    process.wait(60)
    wait_until(lambda: all(map(gone, pids)), 10)
    wait_until(lambda: not list(tmp_path.glob("partitioner-*")), 10)
    process.communicate()
