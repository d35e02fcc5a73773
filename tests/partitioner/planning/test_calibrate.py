"""Kernels of this machine: how blocks are timed, what a host adds, and a plan measured beside its prediction."""

import itertools
import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from partitioner.cli.app import app
from partitioner.cli.jobs.bench_plan import PlanCase
from partitioner.errors import InputError
from partitioner.planning.machine.calibrate import window_seconds
from partitioner.planning.machine.host import Host
from partitioner.program.plan import Plan

SUMMARY: Any = SimpleNamespace(num_ops=100, num_layers=4)


def test_the_least_window_counts_not_the_least_run() -> None:
    """A run takes 1 ms, each third one 4 ms: every window has both kinds."""
    now, costs = [0.0], itertools.cycle((1e-3, 1e-3, 4e-3))

    def work() -> None:
        now[0] += next(costs)

    found = window_seconds(work, lambda seconds: seconds, lambda: now[0], seconds=0.03)
    assert found == pytest.approx(2e-3, rel=0.1)


def test_ranks_measure_at_the_same_time() -> None:
    """Two ranks have a bus to themselves unless both use it; one is slower to set up, and would measure alone behind
    the other, where each took its best.
    """
    using, lock, barrier, shared = [0], threading.Lock(), threading.Barrier(2), [0.0, 0.0]
    found, overlaps = [0.0, 0.0], [[], []]  # type: ignore[var-annotated]

    def rank(number: int) -> None:
        def work() -> None:
            with lock:
                using[0] += 1
            time.sleep(2e-3)
            with lock:
                overlaps[number].append(using[0])
                using[0] -= 1

        def agree(seconds: float) -> float:
            shared[number] = seconds
            barrier.wait()
            most = max(shared)
            barrier.wait()
            return most

        time.sleep(0.02 * number)
        found[number] = window_seconds(work, agree, time.perf_counter, seconds=0.02, windows=2)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] > 2e-3
    assert len(overlaps[0]) == len(overlaps[1])  # as many runs, so that they may communicate
    timed = [each for mine in overlaps for each in mine[2:]]
    assert sum(each == 2 for each in timed) > 0.5 * len(timed)


def test_each_stage_has_its_own_ops_and_a_step_of_its_own() -> None:
    host = Host(step_s=2e-3, op_s=1e-5)
    assert host.beside(SUMMARY, Plan()) == pytest.approx(3e-3)
    assert host.beside(SUMMARY, Plan(tp=4)) == pytest.approx(3e-3)
    assert host.beside(SUMMARY, Plan(pp=4)) == pytest.approx(9e-3)


@pytest.mark.parametrize("wrong", [{"new": 1}, {"rounds": 0}, {"batch": 0}, {"gpus": "8xH999"}])
def test_wrong_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        PlanCase("llama", **{"device": "cpu", **wrong})


@pytest.mark.slow
@pytest.mark.processes
def test_a_plan_is_measured_beside_its_prediction() -> None:
    done = CliRunner().invoke(
        app, ["bench", "plan", "llama", "--tp", "2", "--rounds", "1", "--device", "cpu", "--json"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["plan"] == "tp=2"
    for what in ("ttft_s", "tpot_s"):
        # not a guess out of nothing: within an order of magnitude, also on a busy machine
        assert 0.1 < found["predicted"][what] / found["measured"][what] < 10
