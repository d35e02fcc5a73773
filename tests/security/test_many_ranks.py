"""Degrees that no machine has room for are refused in a line, before memory or time goes; hundreds are reported."""

import resource
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from partitioner import InputError, Plan, PlanError, partition
from partitioner.cli.app import app
from partitioner.compile.parts import Parts
from partitioner.sharding.mesh import MOST_RANKS
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.engine import simulator
from runtime.engine.simulator import Simulator
from runtime.processes import capacity
from tests.support import handmade

_IMPORTED = [import_module(f"partitioner.cli.actions.{name}") for name in ("export", "report", "run", "verify")]
"""What commands import when they are called takes seconds, once."""

COMMANDS = {
    "run": ["run", "--prompt", "a"],
    "run, simulated": ["run", "--prompt", "a", "--simulate"],
    "verify": ["verify", str(EXAMPLE_MODEL)],
    "verify, simulated": ["verify", str(EXAMPLE_MODEL), "--simulate"],
    "report": ["report", str(EXAMPLE_MODEL)],
    "report, generating": ["report", str(EXAMPLE_MODEL), "--generate"],
    "export": ["export", str(EXAMPLE_MODEL), "-o", "never-written"],
}
DEGREES = [
    ["--tp", "100000"],
    ["--tp", str(10**12)],
    ["--plan", "tp=100000"],
    ["--plan", "tp=" + "9" * 4400],
    ["--plan", "dp=1000,tp=1000"],
    ["--plan", "ep=100000"],
    ["--plan", "ep=16000,etp=16000"],
    ["--plan", f"tp={MOST_RANKS},pp={MOST_RANKS}"],
]


@pytest.fixture(autouse=True)
def _at_once() -> Iterator[None]:
    """Seconds of this process and megabytes, where a trace alone takes several of the one and hundreds of the other."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.fixture
def nothing_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: Any, **__: Any) -> None:
        raise AssertionError("it was traced")

    monkeypatch.setattr("partitioner.compile.partition.trace", make)
    monkeypatch.setattr("partitioner.cli.actions.verify.trace", make)


def refused(arguments: list[str]) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert len(done.output) < 10_000
    assert not Path("never-written").exists()
    return " ".join(done.output.split())


@pytest.mark.usefixtures("nothing_made")
@pytest.mark.parametrize(
    ("command", "degrees"),
    [*((command, DEGREES[0]) for command in COMMANDS), *(("verify, simulated", degrees) for degrees in DEGREES[1:])],
    ids=lambda given: given if isinstance(given, str) else given[1][:30],
)
def test_absurd_degrees_are_refused(command: str, degrees: list[str]) -> None:
    assert "error: " in refused([*COMMANDS[command], *degrees])


@pytest.mark.usefixtures("nothing_made")
@pytest.mark.parametrize("command", ["run, simulated", "verify, simulated"])
def test_threads_are_bounded_by_memory(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "_free_bytes", lambda: 499 * capacity.THREAD_BYTES)
    said = refused([*COMMANDS[command], "--tp", "500"])
    assert "500 ranks are too many for this machine: each takes at least 1 MB as a thread" in said


def tiny(num_ranks: int) -> Parts[Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    return partition(LlamaForCausalLM(config).eval().to("meta"), Plan(tp=num_ranks))


def test_hundreds_of_ranks_are_reported_and_graphs_are_bounded_by_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = tiny(700)
    assert len(parts.report.bytes_per_rank) == 700
    monkeypatch.setattr(capacity, "_free_bytes", lambda: 2**20)
    for make in (
        lambda: parts.save(tmp_path / "bundle"),
        lambda: parts.generation_report,
        lambda: parts.cache_bytes(max_batch=1, max_length=8),
        lambda: parts.tokens_that_fit("1 GB"),
    ):
        with pytest.raises(InputError, match="700 ranks are too many for this machine: each rank's program takes"):
            make()
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(InputError, match="as a thread"):
        parts.simulate(input_ids=torch.tensor([[1]]))


def test_the_largest_mesh() -> None:
    assert Plan(tp=MOST_RANKS).mesh.world_size == MOST_RANKS
    for degrees in ({"tp": MOST_RANKS + 1}, {"tp": 10**5000}, {"tp": 2, "pp": MOST_RANKS}):
        with pytest.raises(PlanError, match=f"{MOST_RANKS}"):
            Plan(**degrees)


def test_weights_of_simulated_ranks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices are copies; a whole weight that a model holds is shared."""
    alone, ranks = (Parts(handmade.partitioned(num_ranks), None) for num_ranks in (1, 2))
    assert simulator._copied([alone.rank(0)], None) == 0
    both = [ranks.rank(0), ranks.rank(1)]
    split = sum(weight.bytes for rank in both for weight in rank.weights)
    assert split
    assert simulator._copied(both, None) == split
    monkeypatch.setattr(capacity, "_free_bytes", lambda: 2 * capacity.THREAD_BYTES + split)
    Simulator(both)
    monkeypatch.setattr(capacity, "_free_bytes", lambda: 2 * capacity.THREAD_BYTES + split - 1)
    with pytest.raises(InputError, match=r"2 ranks are too many for this machine: .* and their weights"):
        Simulator(both)


def test_a_thread_that_cannot_be_started_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Parts(handmade.partitioned(3), None)
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "rank 2":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(InputError, match="no more than 2 of 3 threads can be started"):
        ranks.simulate(input_ids=handmade.input_ids())
