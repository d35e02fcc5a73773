"""The launcher: one rank that goes wrong ends all, and so does the launcher's own end; nothing is left behind.

An ended rank ends all within 1 s, a stopped one within its timeout and 1 s. A machine that does much else at the time
gets SLACK_S more: the kill itself takes milliseconds, but processes of half a gigabyte need the processor to end. The
launcher's own process goes last, with all of torch that it has imported: that is waited for, but not timed.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from partitioner.errors import InputError, RankLost
from runtime.processes.launch import launch
from tests.support.processes import forked

MODULE = "tests.faults.lingering_rank"
SLACK_S = 4.0
pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    # torch keeps a cache for all processes of a user, which is not ours to remove
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """Where every rank leaves its process id; all of them, and what they wrote, must be gone soon after the test."""
    folder = tmp_path / "pids"
    folder.mkdir()
    yield folder
    deadline = time.monotonic() + 1 + SLACK_S
    while (left := left_behind(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


def left_behind(folder: Path) -> list[str]:
    alive = [path.name for path in folder.iterdir() if path.name.isdigit() and running(int(path.name))]
    return alive + [path.name for path in (folder.parent / "temporary").iterdir()]


def started(command: list[str], *, ignored: signal.Signals | None = None, **options: Any) -> subprocess.Popen[str]:
    """A process that heeds every signal but `ignored`, whatever this one was started to ignore."""

    def prepare() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)

    return forked.popen(command, text=True, preexec_fn=prepare, **options)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(done: object, what: str) -> None:
    deadline = time.monotonic() + 120
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("fault", "limit_s", "message"),
    [
        ("kill", 1, "rank 1 was ended by SIGKILL"),
        pytest.param(
            "raise",
            1,
            r"rank 1 (ended with exit code 1|failed: ValueError)|rank 0 ended with exit code 1",
            marks=pytest.mark.slow,
        ),
        pytest.param("exit", 1, "rank 0 ended with exit code 1", marks=pytest.mark.slow),
        # that the others end, and say why: test_lost_rank.py
        pytest.param("stop", 6, "rank 0 ended with exit code 1", marks=pytest.mark.slow),
    ],
)
def test_it_stops_the_others(
    fault: str, limit_s: float, message: str, pids: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankLost, match=message):
        launch([MODULE, fault, str(pids)], num_ranks=2, timeout_s=60)
    took_s = time.time() - float((pids / "when").read_text())
    said = capfd.readouterr().err
    print(f"{fault}: all had ended after {took_s:.2f} s")
    assert took_s < limit_s + SLACK_S
    if fault in ("exit", "stop"):
        assert "RankLost: rank 1 " in said


@pytest.mark.interpreters
@pytest.mark.parametrize("fault", ["refuse", pytest.param("refuse one", marks=pytest.mark.slow)])
def test_what_ranks_refuse_is_told_once(fault: str, pids: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"^no rank can do that$"):
        launch([MODULE, fault, str(pids)], num_ranks=2, timeout_s=60)
    assert fault == "refuse one" or "no rank can do that" not in capfd.readouterr().err


def test_it_stops_all_at_the_deadline(pids: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RankLost, match="did not finish within 3 s and were stopped"):
        launch([MODULE, "early", str(pids)], num_ranks=2, timeout_s=3)
    assert time.monotonic() - started < 3 + 1 + SLACK_S


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGKILL, "linger"),
        (signal.SIGINT, "early"),
        pytest.param(signal.SIGTERM, "early", marks=pytest.mark.slow),  # the test below ends by it, too
        pytest.param(signal.SIGKILL, "early", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "linger", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "linger", marks=pytest.mark.slow),
    ],
)
def test_ranks_do_not_outlive_it(number: signal.Signals, moment: str, pids: Path) -> None:
    code = f"from runtime.processes.launch import launch; launch([{MODULE!r}, {moment!r}, {str(pids)!r}], num_ranks=2)"
    launcher = started(["-c", code], stderr=subprocess.PIPE)
    try:
        ready = {"early": lambda: len(list(pids.iterdir())) == 2, "linger": lambda: (pids / "ready").exists()}[moment]
        wait_for(ready, "the ranks did not begin")
        launcher.send_signal(number)
        sent = time.monotonic()
        wait_for(lambda: not left_behind(pids), "ranks or files are left")
        took_s = time.monotonic() - sent
        _, said = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
        launcher.wait()
    print(f"{number.name}, {moment}: all had ended after {took_s:.2f} s")
    assert took_s < 1 + SLACK_S
    assert launcher.returncode == {signal.SIGINT: -2, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert "ChildFailedError" not in said


def test_what_it_was_started_to_ignore_ends_nothing(pids: Path) -> None:
    code = f"from runtime.processes.launch import launch; launch([{MODULE!r}, 'early', {str(pids)!r}], num_ranks=2)"
    launcher = started(["-c", code], ignored=signal.SIGHUP, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: len(list(pids.iterdir())) == 2, "the ranks did not begin")
        launcher.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert len(left_behind(pids)) == 2
        launcher.send_signal(signal.SIGTERM)
        wait_for(lambda: not left_behind(pids), "ranks or files are left")
        launcher.communicate(timeout=120)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_command_line_leaves_nothing(number: signal.Signals, pids: Path) -> None:
    command = ["-m", "partitioner", "run", "--prompt", "def f", "--tp", "2"]
    run = started([*command, "--max-new-tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        wait_for(lambda: len(children.read_text().split()) == 2, "no ranks were started")
        for child in children.read_text().split():
            (pids / child).touch()
        assert run.stdout is not None
        run.stdout.read(6)  # the ranks generate
        run.send_signal(number)
        sent = time.monotonic()
        wait_for(lambda: not left_behind(pids), "ranks or files are left")
        took_s = time.monotonic() - sent
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
        run.wait()
    print(f"partitioner run, {number.name}: all had ended after {took_s:.2f} s")
    assert took_s < 1 + SLACK_S
    assert run.returncode in (-signal.SIGKILL, 130)
    assert not re.search("Traceback", said)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_command_line_says_which_rank_was_killed(victim: int, pids: Path) -> None:
    command = ["-m", "partitioner", "run", "--prompt", "def f", "--tp", "2"]
    run = started([*command, "--max-new-tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert run.stdout is not None
        run.stdout.read(6)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        ranks = {
            int(re.search(rb"\0RANK=(\d)", Path(f"/proc/{each}/environ").read_bytes())[1]): each for each in children
        }  # type: ignore[index]
        for each in children:
            (pids / each).touch()
        os.kill(int(ranks[victim]), signal.SIGKILL)
        sent = time.monotonic()
        wait_for(lambda: not left_behind(pids), "ranks or files are left")
        took_s = time.monotonic() - sent
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
        run.wait()
    print(f"partitioner run, rank {victim} killed: all had ended after {took_s:.2f} s")
    assert took_s < 1 + SLACK_S
    assert run.returncode == 1
    assert f"rank {victim} was ended by SIGKILL" in said
