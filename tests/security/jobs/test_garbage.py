"""A thousand lists of garbage at every socket that a running job listens on: it ends as it would have, same tokens."""

import contextlib
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.security.jobs.doors import Listening
from tests.security.jobs.garbage import LINES
from tests.security.jobs.generating_rank import NUM_TOKENS, PROMPTS, tiny
from tests.security.jobs.local_job import Job, started

pytestmark = pytest.mark.processes
MEETING, RUNNING = 300, 700


def throw(lines: list[bytes], door: Listening, *, ends: bool) -> bool:
    """Whether there was a connection. Nobody waits: to a shut port there never will be one."""
    unix = door.kind == "unix"
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as stranger, contextlib.suppress(OSError):
        stranger.settimeout(0.5 if unix else 0.002)
        stranger.connect("\0" + door.address[1:] if unix else (door.address, int(door.port)))
        stranger.settimeout(0.5)
        with contextlib.suppress(OSError):  # it was turned away in the midst of it
            for line in lines:
                stranger.sendall(line + (b"\n" if ends else b""))
        return True
    return False


def throw_many(job: Job, count: int, ranks: tuple[int, ...]) -> tuple[int, int]:
    """How many examples there were, and how many connections."""
    doors = [door for rank in ranks for door in job.doors(rank)]
    assert doors
    thrown = connected = 0

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(LINES, min_size=1, max_size=3), st.booleans())
    def send(lines: list[bytes], ends: bool) -> None:
        nonlocal thrown, connected
        assert job.process.poll() is None, job.process.communicate()
        thrown += 1
        connected += sum([throw(lines, door, ends=ends) for door in doors])

    send()
    return thrown, connected


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["on", "off"])
def test_a_running_job_ends_as_it_would_have(sharing: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    with started("tests.security.jobs.generating_rank", sharing, tmp_path, pytestconfig.rootpath) as job:
        job.wait_for("pid-0", "pid-1")
        job.wait_for_doors()
        meeting = throw_many(job, MEETING, (0,))
        assert meeting[1] > MEETING // 2  # it does come in there
        job.let("come")
        job.wait_for("ready-0", "ready-1")
        running = throw_many(job, RUNNING, (0, 1))
        assert running[1] == 0  # all shut
        assert meeting[0] + running[0] >= MEETING + RUNNING
        job.let("go")
        rounds = job.end()
    quiet = tiny().generate(PROMPTS, max_new_tokens=NUM_TOKENS)
    assert len(rounds[0]) == len(rounds[1]) > 1  # it went on meanwhile
    assert all(tokens == quiet.tolist() for rank in rounds for tokens in rank)
