"""How a process ends that held a device: at once where a rank is lost, in its own time otherwise."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.processes import device_watch
from runtime.processes.device_watch import DeviceWatch

SCRIPT = """
import atexit, os, sys, time
from partitioner.errors import RankLost
from runtime.processes.device_watch import end_quickly
atexit.register(lambda: (print("cleared away"), time.sleep({seconds})))
for _ in range(2):
    end_quickly()
print("before")
{last}
"""


def end(folder: Path, root: Path, last: str, *, seconds: float = 0) -> tuple[int, str, str, float]:
    (folder / "script.py").write_text(SCRIPT.format(seconds=seconds, last=last))
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, folder / "script.py"], env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - started


@pytest.mark.parametrize("first", ["", "sys.stdout.flush(); os.close(1); print('nobody reads this')"])
def test_a_lost_rank_ends_at_once(first: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    last = f'{first}\nraise RankLost("rank 1 lost")'
    code, out, err, seconds = end(tmp_path, pytestconfig.rootpath, last, seconds=60)
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
def test_all_else_is_cleared_away(last: str, code: int, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    found, out, _, _ = end(tmp_path, pytestconfig.rootpath, last)
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
