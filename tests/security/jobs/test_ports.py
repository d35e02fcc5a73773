"""Which ports a job on one machine opens, and what another user of the machine can do to them: nothing.

The table in docs/security.md is compared with the sockets of every process, as the kernel lists them.
"""

import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests.security.jobs.doors import Listening, knock, listening, why_no_namespaces
from tests.security.jobs.local_job import GARBAGE, Job, started

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="the sockets are read from /proc"),
]


def documented(root: Path) -> dict[tuple[str, str, str], int]:
    """The table of docs/security.md: (process, when, socket) -> how many."""
    rows = {}
    for line in (root / "docs" / "security.md").read_text().splitlines():
        if found := re.fullmatch(r"\| (launcher|rank 0|other ranks) \| (\w+) \| (.+?) \| (\d+) \|.*\|", line):
            rows[found[1], found[2], found[3]] = int(found[4])
    return rows


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


@pytest.mark.parametrize(
    ("sharing", "contents"),
    [
        ("on", GARBAGE[:1]),  # nobody is answered, for a second each; test_strangers.py sends more
        pytest.param("on", GARBAGE, marks=pytest.mark.slow),
        pytest.param("off", GARBAGE, marks=pytest.mark.slow),
    ],
    ids=["on", "all-on", "all-off"],
)
def test_a_job_and_a_stranger(
    sharing: str, contents: list[bytes], tmp_path: Path, visitors: list[Visitor], pytestconfig: pytest.Config
) -> None:
    with started("tests.security.jobs.job_rank", sharing, tmp_path, pytestconfig.rootpath) as job:
        check(job, sharing, contents, visitors, documented(pytestconfig.rootpath))


def check(
    job: Job, sharing: str, contents: list[bytes], visitors: list[Visitor], expected: dict[tuple[str, str, str], int]
) -> None:
    job.wait_for("pid-0", "pid-1")
    (door,) = job.wait_for_doors()
    seen = {("launcher", "meeting", "none"): len(listening(job.process.pid))}
    seen["other ranks", "meeting", "none"] = len(job.doors(1))
    assert door.kind == "unix"
    assert door.address.startswith("@")
    seen["rank 0", "meeting", "Unix socket, abstract"] = 1
    for content in contents:
        for visitor in visitors:
            said = knock(door, content, is_stranger=visitor.is_stranger, where=visitor.where)
            # from another namespace it cannot even be called; here nobody gets an answer without the key
            assert said == (b"" if visitor.where == "here" else None), visitor
    job.let("come")
    job.wait_for("ready-0", "ready-1")
    seen["launcher", "running", "none"] = len(listening(job.process.pid))
    for rank, name in enumerate(("rank 0", "other ranks")):
        doors = job.doors(rank)
        assert {(door.kind, door.address) for door in doors} == {("tcp", "127.0.0.1")}
        seen[name, "running", "TCP on 127.0.0.1, shut"] = len(doors)
        for door in doors:
            for visitor in visitors:
                said = knock(door, GARBAGE[4], is_stranger=visitor.is_stranger, where=visitor.where)
                assert said is None, f"{door} answers {visitor}"
    assert seen == expected
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
