"""Replicas on a local Ray: answers, placement groups, a rank that is lost, the end."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoTokenizer

from partitioner import Plan, partition
from partitioner.errors import InputError
from partitioner.serving.on_ray import application
from partitioner.storage.example import EXAMPLE_MODEL
from tests.partitioner.serving.served import ROOT
from tests.support.processes.free_port import free_port

PATIENCE_S = 240
SERVES = """
import json, sys, ray
from ray import serve
from ray.util import placement_group_table
from partitioner import Plan
from partitioner.serving.on_ray import application

ray.init(num_cpus=4, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": 0, "request_timeout_s": 200})
serve.run(application(sys.argv[1], Plan(), replicas=2, dtype="float64", max_batch=4))
groups = [group["bundles"] for group in placement_group_table().values() if group["state"] == "CREATED"]
print("GROUPS", json.dumps(groups), flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


def test_replicas_are_rays() -> None:
    with pytest.raises(InputError, match=r"give replicas=2 in place of dp"):
        application(EXAMPLE_MODEL, Plan(dp=2))


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'partitioner\[ray\]'"):
        application(EXAMPLE_MODEL)


def descendants(root: int) -> dict[int, str]:
    """The commands of a process's children and theirs."""
    parents, commands = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
            commands[int(path.parent.name)] = Path(path.parent, "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: commands[pid] for pid in found - {root}}


def ranks(root: int) -> list[int]:
    return [pid for pid, command in descendants(root).items() if "runtime.processes.worker" in command]


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextmanager
def on_ray(folder: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The driver, and what it says of the placement groups."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_memory_monitor_refresh_ms": "0"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVES.replace('"port": 0', f'"port": {port}'), str(EXAMPLE_MODEL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    started: list[int] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("GROUPS "):
                break
        else:
            raise AssertionError((folder / "log").read_text()[-4000:])
        started = list(descendants(process.pid))
        yield process, line.removeprefix("GROUPS ").strip()
        started = list(descendants(process.pid))
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 0
        until(lambda: not any(is_there(pid) for pid in started))
    finally:
        for pid in (process.pid, *started):
            if is_there(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs partitioner[ray]")
def test_two_replicas_on_a_local_ray(tmp_path: Path, unused_port: int) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    alone = partition(EXAMPLE_MODEL, Plan(), dtype=torch.float64)
    prompts = ["The value of", "Return a list", "If the"]
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        expected.append(tokenizer.decode(alone.generate([ids], max_new_tokens=12)[0, len(ids) :]))  # type: ignore[index]
    url = f"http://127.0.0.1:{unused_port}"

    def asked(number: int) -> httpx2.Response:
        body = {"model": EXAMPLE_MODEL.name, "prompt": prompts[number % 3], "max_tokens": 12, "temperature": 0}
        return httpx2.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)

    def all_right() -> None:
        for number in range(9):
            answer = asked(number)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == expected[number % 3]

    with on_ray(tmp_path, unused_port) as (driver, groups):
        assert groups == '[{"0": {"CPU": 1.0}}, {"0": {"CPU": 1.0}}]'
        before = ranks(driver.pid)
        assert len(before) == 2
        all_right()
        assert asked(0).json()["object"] == "text_completion"
        refused = httpx2.post(f"{url}/v1/completions", json={"model": "other", "prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        os.kill(before[0], signal.SIGKILL)
        until(lambda: len(set(ranks(driver.pid)) - {before[0]}) == 2)  # Ray has started another
        until(lambda: [asked(number).status_code for number in range(6)] == [200] * 6)
        all_right()


@pytest.fixture
def unused_port() -> int:
    return free_port()
