"""Which ports a job on one machine opens, and what another user of the machine can do to them: nothing.

The table in docs/security.md is compared with the sockets of every process, as the kernel lists them.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.security.doors import Listening, knock, listening, why_no_namespaces

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="the sockets are read from /proc"),
]
CODE = """
import json, sys
from runtime.processes.launch import launch
answers = launch(["tests.security.job_rank", {sharing!r}, {folder!r}], num_ranks=2, timeout_s=120)
print(json.dumps([json.loads(answer) for answer in answers]))
"""


@dataclass
class Job:
    process: subprocess.Popen[str]
    folder: Path

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text())

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 90
        while not all((self.folder / name).exists() and self.ready(name) for name in names):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, names
            time.sleep(0.01)

    def ready(self, name: str) -> bool:
        return not name.startswith("pid") or bool((self.folder / name).read_text())

    def let(self, name: str) -> None:
        (self.folder / name).touch()

    def end(self) -> list[dict[str, Any]]:
        out, err = self.process.communicate(timeout=90)
        assert self.process.returncode == 0, err
        return list(json.loads(out))


@pytest.fixture
def start(tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Callable[[str], Job]]:
    started: list[subprocess.Popen[str]] = []

    def begin(sharing: str) -> Job:
        environment = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", CODE.format(sharing=sharing, folder=str(tmp_path))]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return Job(process, tmp_path)

    yield begin
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate()


def documented(root: Path) -> dict[tuple[str, str, str], int]:
    """The table of docs/security.md: (process, when, socket) -> how many."""
    rows = {}
    for line in (root / "docs" / "security.md").read_text().splitlines():
        if found := re.fullmatch(r"\| (launcher|rank 0|other ranks) \| (\w+) \| (.+?) \| (\d+) \|.*\|", line):
            rows[found[1], found[2], found[3]] = int(found[4])
    return rows


GARBAGE = [b"", b"\n", b"[" * 60_000 + b"\n", b"\0" * 8, b"\1" + b"\0" * 7 + b"x" * 1000, b"HELLO 1 2 3\n", b"x" * 300]


@dataclass(frozen=True)
class Visitor:
    is_stranger: bool
    where: Literal["here", "own"]


@pytest.fixture(scope="module")
def visitors() -> list[Visitor]:
    """Who connects: of this user and of another one, in the job's network namespace and in one of their own."""
    users = (False, True) if os.geteuid() == 0 else (False,)
    places: tuple[Literal["here", "own"], ...] = ("here",) if why_no_namespaces() else ("here", "own")
    return [Visitor(is_stranger, where) for is_stranger in users for where in places]


@pytest.mark.parametrize("sharing", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_a_job_and_a_stranger(
    sharing: str, start: Callable[[str], Job], visitors: list[Visitor], pytestconfig: pytest.Config
) -> None:
    job = start(sharing)
    job.wait_for("pid-0", "pid-1")
    deadline = time.monotonic() + 60
    while not (doors := listening(job.pid(0))):  # rank 0 waits for rank 1
        assert time.monotonic() < deadline
        time.sleep(0.01)
    seen = {("launcher", "meeting", "none"): len(listening(job.process.pid))}
    seen["other ranks", "meeting", "none"] = len(listening(job.pid(1)))
    (door,) = doors
    assert door.kind == "unix"
    assert door.address.startswith("@")
    seen["rank 0", "meeting", "Unix socket, abstract"] = 1
    for content in GARBAGE:
        for visitor in visitors:
            said = knock(door, content, is_stranger=visitor.is_stranger, where=visitor.where)
            # from another namespace it cannot even be called; here nobody gets an answer without the key
            assert said == (b"" if visitor.where == "here" else None), visitor
    job.let("come")
    job.wait_for("ready-0", "ready-1")
    seen["launcher", "running", "none"] = len(listening(job.process.pid))
    for rank, name in enumerate(("rank 0", "other ranks")):
        doors = listening(job.pid(rank))
        assert {(door.kind, door.address) for door in doors} == {("tcp", "127.0.0.1")}
        seen[name, "running", "TCP on 127.0.0.1, shut"] = len(doors)
        for door in doors:
            for visitor in visitors:
                said = knock(door, GARBAGE[4], is_stranger=visitor.is_stranger, where=visitor.where)
                assert said is None, f"{door} answers {visitor}"
    assert seen == documented(pytestconfig.rootpath)
    job.let("go")
    answers = job.end()
    assert answers[0]["result"] == answers[1]["result"]
    assert answers[0]["transport"] == {"on": "shared memory", "off": "gloo"}[sharing]
    assert [answer["unpickled"] for answer in answers] == [[], []]


def test_an_open_port_is_found(visitors: list[Visitor]) -> None:
    """The control: what this test would see if there were one, and that its strangers do connect."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = str(door.getsockname()[1])
        assert Listening("tcp", "127.0.0.1", port) in listening(os.getpid())
        for visitor in visitors:
            said = knock(Listening("tcp", "127.0.0.1", port), b"", is_stranger=visitor.is_stranger, where=visitor.where)
            assert (said is not None) == (visitor.where == "here"), visitor
