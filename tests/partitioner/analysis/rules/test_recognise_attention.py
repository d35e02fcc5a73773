"""Attention that is written out becomes one op where tokens are dealt out: in float64 what it was."""

from __future__ import annotations

from typing import Any

import pytest

from partitioner import Plan
from partitioner.analysis.rules import recognise_attention as module
from partitioner.analysis.rules.recognise_attention import recognise_attention
from partitioner.compile.partition import compile_program
from runtime.ops.attention import attention
from runtime.ops.rows.sequence_attention import sequence_attention
from tests.support.partitioned import EXACT, error, traced

FORMS = [
    pytest.param("gptj", {"causal": True}, 3),  # matmul, a quotient, the causal mask
    pytest.param("bloom", {"causal": True}, 4, marks=pytest.mark.slow),  # baddbmm of alibi, [B H, S, S] in between
    pytest.param("gpt_neo", {"causal": True}, 4, marks=pytest.mark.slow),  # where, and a table of what is seen
    pytest.param("trocr", {"causal": True}, 3, marks=pytest.mark.slow),  # bmm
    pytest.param("codegen", {"causal": True}, 3, marks=pytest.mark.slow),  # the mask is divided too
]


@pytest.mark.parametrize(("name", "options", "operands"), FORMS)
def test_each_form_is_one_op(name: str, options: dict[str, Any], operands: int) -> None:
    program = traced(name)[1].copy()
    assert recognise_attention(program) == 2
    attends = [node for node in program.graph.nodes if node.target is attention]
    assert [len(node.args) for node in attends] == [operands] * 2  # with a mask of its own, or not
    assert all(options.items() <= node.kwargs.items() for node in attends)
    for plan in ("sp=2,sp_attention=ring", "tp=2,sp=3,sp_attention=ulysses"):
        parts = compile_program(traced(name)[1], Plan.parse(plan))
        assert sum(node.target is sequence_attention for node in parts.program.graph.nodes) == 2
        assert any("2 attentions, written out" in note for note in parts.report.notes)
        for length in (1, 33):
            assert error(name, parts, length) < EXACT


def test_a_scale_that_is_forgotten_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(module._Scores, "times", lambda self, factor: self)
    parts = compile_program(traced("gptj")[1], Plan(sp=2))
    assert error("gptj", parts, 33) > 1e-6


def test_without_sp_a_program_is_left_as_it_is() -> None:
    parts = compile_program(traced("gptj")[1], Plan())
    assert not any(node.target is attention for node in parts.program.graph.nodes)
    assert recognise_attention(traced("llama")[1].copy()) == 0
