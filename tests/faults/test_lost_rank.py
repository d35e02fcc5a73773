"""One rank goes wrong: the others end in time with an error that names it, and nothing is left behind.

    a rank that ends        (killed, out of memory, an exception, an early exit)   1 s until all others have ended
    a rank that hangs       (stopped, or busy)                                     the timeout and 1 s

Nobody supervises these ranks (faulty_rank.py): they notice by themselves. What a launcher adds is in test_launcher.py.

Times are those of this machine, whatever else it does: a case may take as much longer as ranks that do nothing took to
begin and to end just before (0.3 s where nothing else runs), and one that is late is run again. `pytest -s` shows them.
The quick suite has a part of the table; `-m "slow and processes"` runs the rest.
"""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.faulty_rank import Case, Outcome
from tests.support.processes import forked
from tests.support.processes.free_port import free_port

pytestmark = pytest.mark.processes

HANGS = ("stop", "slow")
HANG_TIMEOUT_S = 2.0
ATTEMPTS = 3
SAYS = {
    "kill": "rank {} lost: its process ended",
    "term": "rank {} lost: its process ended",
    "raise": "rank {} failed: ValueError: a fault of its own",
    "memory": "rank {} failed: MemoryError: no more memory",
    "oom": "rank {} failed: RuntimeError: [enforce fail at alloc_cpu.cpp",
    "exit": "rank {} failed: SystemExit: 0",
    "interrupt": "rank {} failed: KeyboardInterrupt",
    "close": "rank {} left, by closing the engine, while others wait for it",
    "stop": "rank {} did not answer within 2 s; no sign of life comes from its process",
    "slow": "rank {} did not answer within 2 s; its process is alive: if a step may take that long, give more time",
}
CODES = {"kill": -9, "stop": None, "term": -15, "interrupt": -2, "exit": 0, "close": 0}
PHASES = ("joining", "loading", "prefill", "decode", "sampler")
VICTIMS = (0, 1, 2)

TABLE = [
    Case(fault, phase, (victim,), sharing, timeout_s=HANG_TIMEOUT_S if fault in HANGS else 30.0)
    for fault in ("kill", "raise", "oom", "stop", "memory", "exit", "term", "interrupt")
    for phase in PHASES
    for victim in VICTIMS
    for sharing in ("on", "off")
]
# Every phase, every fault of another kind, rank 0 (whom the others are connected to) and not, both ways to meet.
QUICK = {
    ("kill", "joining", (0,), "on"),
    ("kill", "loading", (1,), "off"),
    ("kill", "prefill", (0,), "off"),
    ("kill", "decode", (1,), "on"),
    ("kill", "sampler", (0,), "on"),
    ("raise", "decode", (1,), "on"),
    ("oom", "loading", (2,), "off"),
    ("exit", "decode", (1,), "off"),
    ("stop", "decode", (0,), "off"),
}
assert {(case.fault, case.phase, case.victims, case.sharing) for case in TABLE} >= QUICK


class Ranks:
    """The process from which ranks are forked."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self._scratch = scratch
        self.temporary = scratch / "temporary"
        self.temporary.mkdir()
        environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = forked.popen(
            ["-m", "tests.faults.faulty_rank"],
            env={**os.environ, **environment, "TMPDIR": str(self.temporary)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._count = 0

    def run(self, case: Case) -> Outcome:
        self._count += 1
        folder = self._scratch / str(self._count)
        folder.mkdir()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        case = replace(case, port=free_port(), folder=str(folder))
        before = _left_over()
        self._process.stdin.write(json.dumps(asdict(case)) + "\n")
        self._process.stdin.flush()
        outcome: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert _left_over() == before
        assert not list(self.temporary.iterdir())
        with socket.create_server(("127.0.0.1", case.port)):
            pass
        return Outcome(**{key: tuple(value) if isinstance(value, list) else value for key, value in outcome.items()})

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0
        self._process.stdout.close()


def _left_over() -> set[str]:
    """Shared memory that has a name; not locks of multiprocessing, which compilers in other tests use meanwhile."""
    names = {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()
    return {name for name in names if not name.startswith("sem.mp-")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Ranks]:
    ranks = Ranks(pytestconfig.rootpath, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture
def ranks_of_their_own(tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Ranks]:
    """Whose memory is soon given back: a copy of the tests' process has theirs too, and two of them end apart."""
    ranks = Ranks(pytestconfig.rootpath, tmp_path)
    yield ranks
    ranks.close()


def check(ranks: Ranks, case: Case, named: tuple[int, ...] | None = None, *, told: bool = True) -> Outcome:
    """`named`: the victims that the others must name, where that is not all. told: whether the time is printed."""
    limit_s = case.timeout_s + 1 if case.fault in HANGS or case.phase == "absent" else 1
    named = case.victims if named is None else named
    for attempt in range(ATTEMPTS):
        outcome = ranks.run(case)
        survivors = [rank for rank in range(case.num_ranks) if rank not in case.victims]
        for rank in survivors:
            text = outcome.texts[rank]
            assert outcome.codes[rank] == 1, text
            for victim in named:
                if case.phase == "absent":
                    expected = f"could not meet the others within 2 s: rank {victim} "
                else:
                    stage = f" (stage {victim})" if case.pp > 1 else ""
                    expected = SAYS[case.fault].format(f"{victim}{stage}")
                assert expected in text, text
            last = text[text.rindex("RankLost: ") :]
            assert not [other for other in survivors if f"rank {other} lost" in last or f"rank {other} did" in last]
        for victim in case.victims:
            assert outcome.codes[victim] == CODES.get(case.fault, 1), outcome.texts[victim]
        took_s = max(outcome.seconds[rank] for rank in survivors)
        who = ", ".join(map(str, case.victims))
        how = f"{case.fault} of {who}, {case.phase}, shared memory {case.sharing}"
        if told:
            print(f"\n{how}: the others ended within {took_s:.2f} s; idle ranks take {outcome.idle_s:.2f} s", end=" ")
        if took_s < limit_s + outcome.idle_s:
            return outcome
        assert attempt < ATTEMPTS - 1, f"{took_s:.2f} s"
    raise AssertionError


def _name(case: Case) -> str:
    return f"{case.fault}-{case.phase}-{case.victims[0]}-{'memory' if case.sharing == 'on' else 'gloo'}"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=_name(case),
            marks=() if (case.fault, case.phase, case.victims, case.sharing) in QUICK else pytest.mark.slow,
        )
        for case in TABLE
    ],
)
def test_the_others_say_who_is_lost(case: Case, ranks: Ranks) -> None:
    check(ranks, case)


def of_stages(fault: str, phase: str, victim: int, sharing: str = "on") -> Case:
    timeout_s = HANG_TIMEOUT_S if fault in HANGS else 30.0
    return Case(fault, phase, (victim,), sharing, timeout_s=timeout_s, pp=3, share_head=phase == "head")


STAGES = [
    of_stages(fault, phase, victim, sharing)
    for fault in ("kill", "raise", "oom", "stop")
    for phase in ("joining", "loading", "prefill", "decode", "head")
    for victim in VICTIMS
    for sharing in ("on", "off")
]
QUICK_STAGES = {("kill", "decode", (1,), "off"), ("stop", "prefill", (0,), "on")}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=_name(case),
            marks=() if (case.fault, case.phase, case.victims, case.sharing) in QUICK_STAGES else pytest.mark.slow,
        )
        for case in STAGES
    ],
)
def test_a_stage_that_is_lost_is_named_by_the_others(case: Case, ranks: Ranks) -> None:
    check(ranks, case)


MEETINGS = [
    Case(fault, phase, (victim,), "on", timeout_s=HANG_TIMEOUT_S if fault in HANGS else 30.0)
    for fault in ("kill", "stop", "raise")
    for phase in ("send", "permute", "exchange", "scatter")
    for victim in VICTIMS
]
QUICK_MEETINGS = {("kill", "send", (1,)), ("stop", "exchange", (2,))}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=_name(case),
            marks=() if (case.fault, case.phase, case.victims) in QUICK_MEETINGS else pytest.mark.slow,
        )
        for case in MEETINGS
    ],
)
def test_a_rank_that_is_lost_in_a_message_is_named_by_the_others(case: Case, ranks: Ranks) -> None:
    """Also by one that only sends, and awaits nothing."""
    check(ranks, case)


SEQUENCES = [
    Case(fault, phase, (victim,), sharing, timeout_s=HANG_TIMEOUT_S if fault in HANGS else 30.0, sp=3)
    for fault in ("kill", "raise", "stop")
    for phase in ("ring", "merge")
    for victim in VICTIMS
    for sharing in ("on", "off")
]


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=_name(case)) for case in SEQUENCES])
def test_a_rank_that_is_lost_in_a_ring_is_named_by_the_others(case: Case, ranks: Ranks) -> None:
    """Each waits for its neighbour, which may wait for its own; all name the one that is gone."""
    check(ranks, case)


@pytest.mark.interpreters
@pytest.mark.parametrize("sharing", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_two_at_once(sharing: str, ranks_of_their_own: Ranks) -> None:
    check(ranks_of_their_own, Case("kill", "decode", (1, 3), sharing, num_ranks=4))


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["on", "off"])
def test_two_at_once_of_which_one_passes_on_what_the_others_say(sharing: str, ranks: Ranks) -> None:
    check(ranks, Case("kill", "decode", (0, 3), sharing, num_ranks=4), named=(0,))


@pytest.mark.parametrize(
    ("fault", "victim"),
    [
        pytest.param(fault, victim, marks=() if (fault, victim) == ("kill", 1) else pytest.mark.slow)
        for fault in ("kill", "stop")
        for victim in VICTIMS
    ],
)
def test_one_that_never_comes_is_named_at_the_deadline(fault: str, victim: int, ranks: Ranks) -> None:
    """Until a rank has come, nothing tells that it will not."""
    check(ranks, Case(fault, "absent", (victim,), "on", timeout_s=2.0))


@pytest.mark.parametrize("sharing", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_one_that_is_slow_is_told_apart_from_one_that_is_lost(sharing: str, ranks: Ranks) -> None:
    case = Case("slow", "decode", (1,), sharing, timeout_s=HANG_TIMEOUT_S)
    outcome = check(ranks, case)
    assert "Engine.connect(..., timeout_s=600)" in outcome.texts[0]
    # it finds out, too, once it is through with its step
    assert "RankLost: rank 1 did not answer within 2 s" in outcome.texts[1]


def test_one_that_closes_its_engine_early_is_named(ranks: Ranks) -> None:
    check(ranks, Case("close", "decode", (1,), "on"))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_nobody_lost_nobody_named(num_ranks: int, ranks: Ranks) -> None:
    outcome = ranks.run(Case("none", "none", (), "on", num_ranks=num_ranks))
    assert outcome.codes == (0,) * num_ranks
    assert "RankLost" not in "".join(outcome.texts)
