"""Memory between processes, and knowing who is alive."""

import ctypes
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from runtime.communication.shared_memory.segment import Address, Segment

OTHER = """
import ctypes, sys
from runtime.communication.shared_memory.segment import Address, Segment
segment = Segment.open(Address({pid}, {descriptor}, {name!r}, {num_bytes}))
segment.hold(1)
ctypes.memset(segment.start + 100, 7, 3)
print("ready", flush=True)
sys.stdin.readline()
segment.close()
print("closed", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(5000)
    yield segment
    segment.close()


@pytest.fixture
def other(segment: Segment, pytestconfig: pytest.Config) -> Iterator[subprocess.Popen[str]]:
    """A process that has opened the segment and holds 1."""
    code = OTHER.format(**dataclasses.asdict(segment.address))
    environment = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath)}
    command = [sys.executable, "-P", "-c", code]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.usefixtures("other")
def test_others_see_the_same_memory(segment: Segment) -> None:
    assert ctypes.string_at(segment.start + 99, 5) == b"\0\7\7\7\0"
    assert segment.is_held(1)


def test_closing_lets_go(segment: Segment, other: subprocess.Popen[str]) -> None:
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.stdout.readline() == "closed\n"
    assert not segment.is_held(1)
    assert ctypes.string_at(segment.start + 100, 1) == b"\7"


def test_a_killed_process_holds_nothing_even_as_a_zombie(segment: Segment, other: subprocess.Popen[str]) -> None:
    other.kill()
    deadline = time.monotonic() + 5
    while segment.is_held(1) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not segment.is_held(1)
    assert other.returncode is None, "nobody has waited for it yet"


def test_something_else_is_not_opened() -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match=r"is pipe:\[\d+\] here, not the segment partitioner-x"):
        Segment.open(Address(os.getpid(), reader, "partitioner-x", 1))
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match="No such file"):
        Segment.open(Address(os.getpid(), reader, "partitioner-x", 1))
