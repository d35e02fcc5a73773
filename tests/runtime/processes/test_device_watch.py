"""How a process ends that held a device: at once where a rank is lost, in its own time otherwise."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.processes import device_watch
from runtime.processes.device_watch import DeviceWatch

SCRIPT = """
import atexit, json, os, sys, time
from partitioner.errors import RankLost
from runtime.processes.device_watch import end_quickly
for line in sys.stdin:
    asked = json.loads(line)
    if not (child := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for number, name in enumerate(("out", "err"), 1):
    os.dup2(os.open(os.path.join(asked["folder"], name), os.O_CREAT | os.O_WRONLY), number)
atexit.register(lambda: (print("cleared away"), time.sleep(asked["seconds"])))
for _ in range(2):
    end_quickly()
print("before")
exec(asked["last"])
"""
"""An interpreter that imports what all need, once; for each end that is asked of it, a process of its own goes on below
the loop, and ends as an interpreter does.
"""

Ended = tuple[int, str, str, float]
End = Callable[..., Ended]


@pytest.fixture(scope="module")
def ends(pytestconfig: pytest.Config) -> Iterator[End]:
    """The exit code of a process whose last words are `last`, what it wrote, and how long it took."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={"PYTHONPATH": str(pytestconfig.rootpath)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asks, told = process.stdin, process.stdout

        def end(folder: Path, last: str, *, seconds: float = 0) -> Ended:
            started = time.monotonic()
            print(json.dumps({"folder": str(folder), "last": last, "seconds": seconds}), file=asks, flush=True)
            code = int(told.readline())
            return code, (folder / "out").read_text(), (folder / "err").read_text(), time.monotonic() - started

        yield end


@pytest.mark.parametrize("first", ["", "sys.stdout.flush(); os.close(1); print('nobody reads this')"])
def test_a_lost_rank_ends_at_once(first: str, tmp_path: Path, ends: End) -> None:
    last = f'{first}\nraise RankLost("rank 1 lost")'
    code, out, err, seconds = ends(tmp_path, last, seconds=60)
    assert (code, out) == (1, "before\n")
    assert "RankLost: rank 1 lost" in err
    assert seconds < 50


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("raise ValueError", 1),
        ("", 0),
        ("sys.exit(3)", 3),
        ("try:\n    raise RankLost('')\nexcept RankLost: pass", 0),
        ("sys.ps1 = '>>> '\nraise RankLost('')", 1),  # as at a prompt
    ],
)
def test_all_else_is_cleared_away(last: str, code: int, tmp_path: Path, ends: End) -> None:
    found, out, _, _ = ends(tmp_path, last)
    assert (found, out) == (code, "before\ncleared away\n")


class Beats:
    """What a rank of two hears of the other."""

    rank, num_ranks = 0, 2

    def __init__(self) -> None:
        self.asked, self.ended = 0, False

    def names(self, ranks: list[int]) -> str:
        return f"rank {ranks[0]}"

    def lost(self) -> dict[int, str]:
        self.asked += 1
        return {1: "lost: its process ended"} if self.ended else {}

    def silent_s(self, rank: int) -> float:
        return 0.0


def test_who_was_there_a_moment_ago_is_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    beats, now = Beats(), [100.0]
    watch = DeviceWatch.__new__(DeviceWatch)  # without its thread
    watch._heartbeat, watch._timeout_s, watch._late, watch._well_until = beats, 30.0, (), 0.0  # type: ignore[assignment]
    monkeypatch.setattr(device_watch.time, "monotonic", lambda: now[0])
    assert [watch.cause() for _ in range(3)] == [None] * 3
    assert beats.asked == 1
    beats.ended = True
    now[0] += device_watch._GLANCE_S + 0.001
    assert watch.cause() == watch.cause() == "rank 1 lost: its process ended"  # a loss is told each time
    assert device_watch._GLANCE_S < 0.1
