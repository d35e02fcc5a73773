"""The measured timeline of stages: what is a piece's own, what is waiting, and that real runs are what is computed."""

from __future__ import annotations

from typing import Any

import pytest

from partitioner.errors import InputError
from runtime.execution.chrome_trace import Recorded
from runtime.pipeline.measured import measured
from runtime.pipeline.schedule import chain
from runtime.pipeline.timing import time_of
from runtime.processes.launch import launch


def recorded(stage: int, runs: list[tuple[int, int]], *, host: str = "one") -> Recorded:
    made = Recorded(rank=stage, coordinates={"pp": stage}, host=host, device="cpu")
    made.runs = [{"start": start, "end": end, "begins": [], "ends": [], "meetings": []} for start, end in runs]
    return made


def transfer(number: int, begin: tuple[int, int], finish: tuple[int, int] | None, **ends: int) -> dict[str, Any]:
    told = {"start": begin[0], "end": begin[1], "finish": finish, "meeting": [[0, 1], number]}
    return {"to": None, "from": None, **told, **ends}


def two_stages(host: str = "one") -> list[Recorded]:
    """Two pieces: stage 0 runs 10, copies 2; stage 1 takes 1, runs 20 and 10, and waits for none but the first."""
    first, second = recorded(0, [(100, 110), (112, 122)]), recorded(1, [(113, 133), (136, 146)], host=host)
    first.transfers = [transfer(0, (110, 112), None, to=1), transfer(1, (122, 124), None, to=1)]
    second.transfers = [
        transfer(0, (90, 91), (95, 113), **{"from": 0}),
        transfer(1, (91, 92), (135, 136), **{"from": 0}),
    ]
    return [first, second]


def spans(ranks: list[Recorded]) -> list[tuple[int, int, int, int]]:
    return sorted((s.stage, s.piece, round(s.start * 1e9), round(s.stop * 1e9)) for s in measured(ranks).spans)


def test_a_piece_is_its_run_with_copies_and_without_waiting() -> None:
    found = measured(two_stages())
    # until 112 stage 1 waits; what lies between its pieces is its own
    assert spans(two_stages()) == [(0, 0, 0, 12), (0, 1, 12, 24), (1, 0, 12, 35), (1, 1, 35, 46)]
    assert found.stop == pytest.approx(46e-9)
    assert found.bubble == pytest.approx(1 - (12 + 12 + 23 + 11) / (2 * 46))
    assert found.seconds == [pytest.approx([12e-9, 12e-9]), pytest.approx([23e-9, 11e-9])]
    assert time_of(chain(2, 2), found.seconds).bubble == pytest.approx(found.bubble)


def test_without_a_common_clock_a_receive_is_waiting() -> None:
    assert spans(two_stages(host="another"))[2:] == [(1, 0, 13, 35), (1, 1, 36, 46)]


def test_a_message_that_comes_late_is_waited_for() -> None:
    """And one that is copied as late, though it was there, is not: that is the stage's own time."""
    first, second = two_stages()
    second.transfers[1]["finish"], second.runs[1] = (135, 146), {**second.runs[1], "start": 146, "end": 156}
    assert spans([first, second])[2:] == [(1, 0, 12, 35), (1, 1, 35, 56)]
    first.runs[1] = {**first.runs[1], "end": 143}
    first.transfers[1] |= {"start": 143, "end": 145}
    assert spans([first, second])[1:] == [(0, 1, 12, 45), (1, 0, 12, 35), (1, 1, 45, 56)]


def test_a_collective_of_stages_is_waiting_until_the_last_has_come() -> None:
    ranks = two_stages()
    for rank, start in zip(ranks, (124, 146), strict=True):
        rank.calls = [{"start": start, "end": 150, "meeting": [[0, 1], 7]}]
        rank.steps = [{"name": "sampling", "start": 150, "end": 154}]
    assert spans(ranks)[1::2] == [(0, 1, 34, 54), (1, 1, 35, 54)]


def test_no_timeline_of_one_stage_or_of_nothing() -> None:
    with pytest.raises(InputError, match="of one stage"):
        measured(two_stages()[:1])
    idle = two_stages()
    idle[1].runs.clear()
    with pytest.raises(InputError, match="ran nothing"):
        measured(idle)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_are_idle_as_their_schedule_is(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.pipeline.measured_rank"], num_ranks=2, timeout_s=240)
