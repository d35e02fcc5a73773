"""Kernels of this machine: how blocks are timed, what a host adds, and a plan measured beside its prediction."""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from partitioner.cli.app import app
from partitioner.cli.bench.plan import PlanCase
from partitioner.errors import InputError
from partitioner.planning.machine.calibrate import block_seconds
from partitioner.planning.machine.host import Host
from partitioner.program.plan import Plan

SUMMARY: Any = SimpleNamespace(num_ops=100, num_layers=4)


def test_the_least_block_counts_not_the_least_run() -> None:
    """A run takes 1 ms, each third one 4 ms: a block of 4 ms and more has both kinds."""
    now, costs = [0.0], itertools.cycle((1e-3, 1e-3, 4e-3))

    def work() -> None:
        now[0] += next(costs)

    assert 1e-3 < block_seconds(work, lambda: now[0], seconds=0.03) <= 2.1e-3


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
