"""One rank goes wrong: the others end within bounded time with an error that says which, and nothing keeps running."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from partitioner.errors import RankLost
from runtime.launch import launch

MODULE = "tests.faults.faulty_rank"
pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """Where every rank leaves its process id; all of them must be gone after the test."""
    yield tmp_path
    started = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    deadline = time.monotonic() + 3
    while (left := [pid for pid in started if running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def run_without_launcher(fault: str, num_ranks: int, pids: Path, sharing: str) -> tuple[list[int], list[str], float]:
    """Exit codes, error outputs, and seconds from the fault until the last rank ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        place = {"RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, "-P", "-m", MODULE, fault, str(pids), sharing]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        texts = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], texts, time.time() - float((pids / "when").read_text())


@pytest.mark.parametrize("sharing", ["on", "off"])
@pytest.mark.parametrize(
    ("fault", "num_ranks", "victim", "message"),
    [
        ("kill", 3, 1, "RankLost: rank 1 lost: its process ended"),
        ("kill-host", 2, 0, "RankLost: rank 0 lost: its process ended"),
        ("raise", 2, 1, "RankLost: rank 1 failed: ValueError: a fault of its own"),
        ("hang", 2, 1, "RankLost: rank 1 did not answer within 3 s; its process is alive"),
    ],
)
def test_the_others_say_who_is_lost(
    fault: str, num_ranks: int, victim: int, message: str, sharing: str, pids: Path
) -> None:
    codes, texts, seconds = run_without_launcher(fault, num_ranks, pids, sharing)
    survivors = [rank for rank in range(num_ranks) if rank != victim]
    for rank in survivors:
        assert codes[rank] not in (0, None)
        assert message in texts[rank]
        assert "awaited by rank " in texts[rank]
        assert ("  shared memory: " in texts[rank]) == (sharing == "on")
    if fault.startswith("kill"):
        assert codes[victim] == -signal.SIGKILL
    print(f"{fault}, shared memory {sharing}: {seconds:.2f} s until all had ended")
    # one second is what it takes here alone; a loaded machine gets more, and a hang would take the deadline
    assert seconds < (15 if fault == "hang" else 10)


@pytest.mark.parametrize(("fault", "message"), [("kill", "was ended by SIGKILL"), ("raise", "ended with exit code 1")])
def test_the_launcher_stops_the_others(fault: str, message: str, pids: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RankLost, match=message):
        launch([MODULE, fault, str(pids), "on"], num_ranks=2, timeout_s=60)
    assert time.monotonic() - started < 30
    assert time.time() - float((pids / "when").read_text()) < 10


def test_the_launcher_stops_all_at_the_deadline(pids: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RankLost, match="did not finish within 8 s and were stopped"):
        launch([MODULE, "linger", str(pids), "on"], num_ranks=2, timeout_s=8)
    assert time.monotonic() - started < 20


def test_ranks_do_not_outlive_a_killed_launcher(pids: Path) -> None:
    code = f"from runtime.launch import launch; launch([{MODULE!r}, 'linger', {str(pids)!r}, 'on'], num_ranks=1)"
    launcher = subprocess.Popen([sys.executable, "-P", "-c", code])
    try:
        deadline = time.monotonic() + 40
        while not any(path.name.isdigit() for path in pids.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        launcher.kill()
        launcher.wait()
