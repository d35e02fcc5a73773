"""How a process ends that held a device: at once where a rank is lost, in its own time otherwise."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

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
