"""Experts that take a limited number of tokens: what is over is left out, counted exactly, and told."""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import partitioner
from partitioner import Plan, partition
from partitioner.compile.partition import compile_program
from partitioner.errors import LayoutError, PlanError
from partitioner.proof.layouts import check
from passes.expert_parallel import ExpertParallel
from runtime.ops.experts import expert_combine, expert_dispatch, limit_experts
from tests.support import generated, zoo
from tests.support.partitioned import EXACT, error, tokens, traced

NAME = "mixtral"
EXPERTS, CHOICES = 4, 2


@functools.cache
def parts(degrees: str, exchange: str, capacity: float) -> Any:
    plan = Plan.parse(degrees)
    given = {axis: plan.degree(axis) for axis in ("tp", "ep", "etp")}
    return compile_program(
        traced(NAME)[1], Plan(**given, passes=[ExpertParallel(exchange=exchange, capacity=capacity)])
    )


def kept_one_by_one(index: Tensor, num_experts: int, capacity: float) -> Tensor:
    """Token by token, as GShard's algorithm 1 has it."""
    most = max(1, math.ceil(capacity * index.numel() / num_experts))
    taken, kept = [0] * num_experts, torch.ones_like(index, dtype=torch.bool)
    for token, choices in enumerate(index.tolist()):
        for place, expert in enumerate(choices):
            if expert < num_experts:
                kept[token, place] = taken[expert] < most
                taken[expert] += 1
    return kept


class Limited(fx.Interpreter):
    """The whole model, whose experts are limited one by one."""

    def __init__(self, graph: fx.Graph, capacity: float) -> None:
        super().__init__(fx.GraphModule({}, graph))
        self.capacity = capacity
        self.left_out: list[Tensor] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is expert_dispatch:
            hidden, index, num_experts = args
            self.kept = kept_one_by_one(index, num_experts, self.capacity)
            self.left_out.append(torch.bincount(index[~self.kept], minlength=num_experts))
            args = (hidden, torch.where(self.kept, index, num_experts), num_experts)
        elif target is expert_combine:
            rows, order, gates = args
            args = (rows, order, torch.where(self.kept, gates, 0))
        return super().call_function(target, args, kwargs)


@functools.cache
def expected(length: int, capacity: float) -> tuple[Tensor, list[Tensor]]:
    (engine,) = compile_program(traced(NAME)[1], Plan())._simulator.engines
    run = Limited(engine._run._graph, capacity)
    ids = tokens(NAME, length)
    given = {"input_ids": ids, "position_ids": torch.arange(length).expand(ids.shape)}
    values = [given[wanted.name] for wanted in engine.program.inputs]
    with torch.no_grad():
        return run.run(*engine.weights, *values), run.left_out


def test_kept_choices() -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        num_experts = 1 + number % 7
        shape = (number % 11, 1 + number % min(3, num_experts))
        index = torch.randint(0, num_experts + 1, shape, generator=generator)
        gates = torch.rand(shape, generator=generator)
        kept = kept_one_by_one(index, num_experts, 1 + number % 3 / 2)
        found, weighed = limit_experts(index, gates, num_experts=num_experts, capacity=1 + number % 3 / 2)
        assert torch.equal(found, torch.where(kept, index, num_experts))
        assert torch.equal(weighed, torch.where(kept, gates, 0))


@pytest.mark.parametrize("exchange", ["replicate", "exchange"])
@pytest.mark.parametrize("degrees", [pytest.param("ep=2", marks=pytest.mark.slow), "tp=2,ep=4"])
def test_equal_where_nothing_is_over(degrees: str, exchange: str, caplog: pytest.LogCaptureFixture) -> None:
    held = parts(degrees, exchange, EXPERTS)
    with caplog.at_level(logging.WARNING, logger="partitioner"):
        assert error(NAME, held, 6) < EXACT
    assert not any("left out" in record.message for record in caplog.records)
    assert all(engine.profiler.overflow.total == 0 for engine in held._simulator.engines)


@pytest.mark.parametrize(
    ("degrees", "exchange"),
    [("ep=2", "replicate"), ("ep=3", "exchange"), ("tp=2,ep=4", "exchange"), ("tp=2,ep=2,etp=2", "replicate")],
)
def test_what_is_over_is_left_out_and_counted(degrees: str, exchange: str) -> None:
    held, length = parts(degrees, exchange, 1), 9
    wanted, left_out = expected(length, 1)
    assert sum(int(each.sum()) for each in left_out) > 0

    def work(engine: Any) -> Any:
        with engine.routing() as routing:
            logits = engine(input_ids=tokens(NAME, length))
        return logits, list(routing.left_out.values()), routing.counts

    found = held._simulator.run(work)
    for logits, counts, _ in found:
        assert torch.allclose(logits, wanted, rtol=1e-9, atol=1e-9)
        assert all(torch.equal(mine, right) for mine, right in zip(counts, left_out, strict=True))
    # the negative control: without a limit it is another result
    assert error(NAME, held, length) > 1e-3


def test_a_full_expert_is_told(caplog: pytest.LogCaptureFixture) -> None:
    held = compile_program(traced(NAME)[1], Plan(ep=2, passes=[ExpertParallel(capacity=1)]))
    assert any("capacity 1: an expert takes at most" in note for note in held.report.notes)
    with caplog.at_level(logging.WARNING, logger="partitioner"):
        held.simulate(input_ids=tokens(NAME, 9))
    total = sum(int(each.sum()) for each in expected(9, 1)[1])
    layers = len(expected(9, 1)[1])
    said = f"experts were full: {total} of {2 * 9 * CHOICES * layers} choices were left out"
    assert sum(said in record.message for record in caplog.records) == 2, "once on each rank"


def test_prompts_are_limited_and_single_tokens_are_not() -> None:
    held = parts("ep=2", "auto", EXPERTS)
    limited = {
        entry: [node for node in held.program_of(entry).graph.nodes if node.target is limit_experts]
        for entry in ("text", "prefill", "decode")
    }
    assert [bool(each) for each in limited.values()] == [True, True, False]
    assert generated.error(NAME, held, generated.prompts(NAME, (1, 7, 4)), new=3) < 1e-9


def test_a_bundle_limits_as_well(tmp_path: Path) -> None:
    plan = Plan.parse("ep=2,expert-parallel.capacity=1.25")
    made = partition(zoo.tiny(NAME)[0], plan)
    made.save(tmp_path / "bundle")
    ids = tokens(NAME, 9)
    assert torch.equal(partitioner.load(tmp_path / "bundle").simulate(input_ids=ids), made.simulate(input_ids=ids))


@pytest.mark.parametrize("capacity", [0.5, -1, math.inf, math.nan, "2", True])
def test_no_such_capacity(capacity: Any) -> None:
    with pytest.raises(PlanError, match="capacity must be a number, at least 1 times the mean"):
        ExpertParallel(capacity=capacity)


def test_a_capacity_without_ep_is_refused() -> None:
    with pytest.raises(PlanError, match="capacity=2 limits experts that are dealt out over ep"):
        parts("tp=2,etp=2", "auto", 2)


def test_gates_that_are_not_limited_are_refused() -> None:
    program = parts("ep=2", "replicate", 2).program.copy()
    check(program)
    node = next(node for node in program.graph.nodes if node.target is limit_experts)
    gates = next(user for user in node.users if user.args[1] == 1)
    gates.replace_all_uses_with(node.args[1])
    with pytest.raises(LayoutError, match=r"takes choices of .* and gates of no exchange"):
        check(program)
