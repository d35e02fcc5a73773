"""Tokens one by one against the whole text: what a step forgets, mixes or does otherwise shows up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from partitioner import Plan, PlanError, partition
from partitioner.compile.tracing.probe_decode import compare_steps
from partitioner.compile.tracing.trace import trace, trace_step
from partitioner.program.program import Program
from passes.kv_cache import KvCache
from runtime.ops.state import state_write
from tests.support import zoo

NAME = "lfm2_moe"


@functools.cache
def programs() -> tuple[Program, Program]:
    model = zoo.tiny(NAME)[0]
    return trace(model), KvCache().run(trace_step(model))


def damaged(op: Callable[..., Any], *options: object) -> Program:
    """The steps, where what the first state becomes has gone through `op`."""
    program = programs()[1].copy()
    write: fx.Node = next(node for node in program.graph.nodes if node.target is state_write)
    with program.graph.inserting_before(write):
        value = program.graph.call_function(op, (write.args[0], *options))
    value.meta = dict(write.meta)
    write.args = (value, *write.args[1:])
    return program


def test_a_faithful_trace_has_nothing_to_say() -> None:
    assert compare_steps(*programs()) is None


@pytest.mark.parametrize(("op", "options"), [(torch.mul, (0.0,)), (torch.flip, ([0],))], ids=["forgets", "mixes rows"])
def test_a_step_that_forgets_or_mixes_rows_is_refused(op: Callable[..., Any], options: tuple[object, ...]) -> None:
    with pytest.raises(PlanError, match=r"cannot generate: fed tokens one by one, .* does not continue its own text"):
        compare_steps(programs()[0], damaged(op, *options))


def test_a_small_difference_is_a_note() -> None:
    note = compare_steps(programs()[0], damaged(torch.mul, 1 + 1e-4))
    assert note is not None
    assert "computes something else than for the whole text: logits differ by up to" in note
    assert note.endswith("over 6 tokens in float64. Texts are continued as by the former")


def test_in_the_dtype_of_the_model_where_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partitioner.compile.tracing.probe_decode.EXACT_BYTES", 0)
    monkeypatch.setattr("partitioner.compile.tracing.probe_decode._ROUNDING", {torch.float64: 0.0})
    note = compare_steps(*programs())
    assert note is not None  # its norms go through float32


def test_without_data_it_says_so() -> None:
    """And the report says it; of a model whose own cache is by position, as that takes fewest proofs."""
    parts = partition(zoo.tiny("bloom", num_hidden_layers=1)[0].to("meta"), Plan())
    assert any("was not tried out: the model holds no data" in note for note in parts.generation_report.notes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zamba2", "nemotron_h"])
def test_models_whose_two_ways_differ_run_single_tokens_as_whole_texts(name: str) -> None:
    report = partition(zoo.tiny(name)[0], Plan(tp=2)).generation_report
    assert any(note.startswith("single tokens run by the model's code for several") for note in report.notes)
    assert not any("than for the whole text" in note for note in report.notes)
