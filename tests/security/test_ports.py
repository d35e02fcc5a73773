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
from typing import Any

import pytest

STRANGER = 65534
"127.0.0.1".encode("idna")  # a stranger may not read what Python would import for that
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


@dataclass(frozen=True)
class Listening:
    kind: str
    address: str
    port: str


def listening(pid: int) -> list[Listening]:
    """All sockets of a process to which anybody could connect, as the kernel lists them."""
    own = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(os.readlink(path))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6", "unix"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if table == "unix":
                inode, is_open = fields[6], int(fields[3], 16) & 0x10000  # __SO_ACCEPTCON
                place = (fields[7] if len(fields) > 7 else "", "")
            else:
                inode, is_open = fields[9], fields[3] == "0A" or table.startswith("udp")
                at, port = fields[1].split(":")
                place = (".".join(str(byte) for byte in reversed(bytes.fromhex(at))), str(int(port, 16)))
            if is_open and f"socket:[{inode}]" in own:
                found.append(Listening(table, *place))
    return found


def knock(door: Listening, content: bytes, *, as_stranger: bool) -> bytes | None:
    """What who sends `content` there gets; None: not even a connection."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if as_stranger:
                os.setgroups([])
                os.setgid(STRANGER)
                os.setuid(STRANGER)
            if door.kind == "unix":
                connection = socket.socket(socket.AF_UNIX)
                connection.settimeout(3)
                connection.connect("\0" + door.address[1:])
            else:
                connection = socket.create_connection((door.address, int(door.port)), timeout=1)
            os.write(writer, b"connected ")
            try:
                connection.sendall(content)
                connection.settimeout(1)
                os.write(writer, connection.recv(1000))
            except OSError:
                pass
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said.removeprefix(b"connected ") if said else None


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


@pytest.mark.parametrize("sharing", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_a_job_and_a_stranger(sharing: str, start: Callable[[str], Job], pytestconfig: pytest.Config) -> None:
    as_stranger = os.geteuid() == 0
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
        assert knock(door, content, as_stranger=as_stranger) == b""
        assert knock(door, content, as_stranger=False) == b""  # and of this user, without the key
    job.let("come")
    job.wait_for("ready-0", "ready-1")
    seen["launcher", "running", "none"] = len(listening(job.process.pid))
    for rank, name in enumerate(("rank 0", "other ranks")):
        doors = listening(job.pid(rank))
        assert {(door.kind, door.address) for door in doors} == {("tcp", "127.0.0.1")}
        seen[name, "running", "TCP on 127.0.0.1, shut"] = len(doors)
        for door in doors:
            for user in (as_stranger, False):
                assert knock(door, GARBAGE[4], as_stranger=user) is None, f"{door} answers"
    assert seen == documented(pytestconfig.rootpath)
    job.let("go")
    answers = job.end()
    assert answers[0]["result"] == answers[1]["result"]
    assert answers[0]["transport"] == {"on": "shared memory", "off": "gloo"}[sharing]
    assert [answer["unpickled"] for answer in answers] == [[], []]


def test_an_open_port_is_found() -> None:
    """The control: what this test would see if there were one, and that its strangers do connect."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = str(door.getsockname()[1])
        assert Listening("tcp", "127.0.0.1", port) in listening(os.getpid())
        assert knock(Listening("tcp", "127.0.0.1", port), b"", as_stranger=os.geteuid() == 0) is not None
