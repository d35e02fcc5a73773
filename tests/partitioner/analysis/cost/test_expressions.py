"""Expressions against the numbers of `node_costs`, at numbers of ranks that they were not made for."""

from typing import Any

import pytest
import sympy

from partitioner import Plan
from partitioner.analysis.cost.expressions import EXPERTS, MET, PAST, ROUTED, Expressions
from partitioner.analysis.cost.layer_costs import layer_costs
from partitioner.analysis.cost.node_cost import node_costs
from partitioner.compile.partition import compile_program
from partitioner.sharding.split_class import SplitClass
from tests.support import zoo
from tests.support.partitioned import compiled_for, traced

BATCH = 2


def largest(program: Any, tp: int, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """By node, the most of flops, bytes read, bytes written and sent of any rank."""
    found: dict[str, tuple[int, ...]] = {}
    for rank in range(tp):
        for cost in node_costs(program, {"tp": rank}, sizes):
            sent = sum(meeting.bytes for meeting in cost.meetings)
            mine = (cost.flops, cost.bytes_read, cost.bytes_written, sent)
            found[cost.name] = tuple(map(max, found.get(cost.name, mine), mine))
    return found


@pytest.mark.parametrize(
    ("name", "moe", "length", "past"),
    [
        ("llama", 0, 7, 0),
        ("mixtral", 2, 1, 11),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("llama", 0, 1, 11), ("mixtral", 2, 7, 0), ("gemma3_text", 0, 7, 0), ("gemma3_text", 0, 1, 11))
        ),
    ],
)
def test_one_analysis_for_two_ranks_prices_three(name: str, moe: int, length: int, past: int) -> None:
    program = traced(name)[1]
    made = Expressions(compile_program(program, Plan(tp=2)).program_of("prefill"), length)
    three = compile_program(program, Plan(tp=3)).program_of("prefill")
    wanted = largest(three, 3, {"batch": BATCH, "sequence": length, "past": past})
    costs = made.all()
    values: dict[Any, float] = {symbol: kind.held(3) for (kind, _), symbol in made.sizes.classes.symbols.items()}
    values |= {made.program.symbols["batch"]: BATCH, made.program.symbols["sequence"]: length, PAST: past}
    values |= {EXPERTS: zoo.EXPERTS, MET: min(zoo.EXPERTS, moe * BATCH * length), ROUTED: 1}
    compared = 0
    for node, cost in costs.items():
        sent = sum(meeting.bytes for meeting in cost.meetings)
        found = [sympy.sympify(each).subs(values) for each in (cost.flops, cost.read, cost.written, sent)]
        assert found == list(wanted[node.name]), node.name
        compared += 1
    assert compared > 50
    assert not made.sizes.classes.guessed


def test_a_wrong_class_is_noticed() -> None:
    """Negative control: a class that does not give the sizes at hand is not used."""
    program = compiled_for("llama", "tp=2").program_of("prefill")
    program.split_classes = {name: SplitClass(3, 3) for name in program.split_classes}
    made = Expressions(program, 7)
    made.all()
    assert all(kind != SplitClass(3, 3) for kind, _ in made.sizes.classes.symbols)


def test_the_cost_of_parts_is_printed_by_kind_of_layer() -> None:
    parts = compiled_for("llama", "tp=2")
    found = parts.cost()
    said = str(found)
    assert "heads: of 4" in said
    assert "batch*heads" in said
    assert "all_reduce over tp" in said
    assert sum(layer.count for layer in found.layers) == 3  # two layers, and what is outside
    decode = parts.cost("decode")
    assert decode.total("flops") != 0
    assert str(PAST) in str(found.total("flops"))


def test_costs_at_one_rank_have_no_classes() -> None:
    found = layer_costs(compiled_for("llama", "tp=1").program_of("prefill"))
    assert not found.classes
