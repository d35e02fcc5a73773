"""The sequence-parallel pass: each rank has its own tokens between its linears, and nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from partitioner.analysis.cost.program_cost import program_cost
from partitioner.errors import LayoutError
from partitioner.program.program import Program
from partitioner.proof.layouts import check
from runtime.ops.collectives import all_reduce
from runtime.ops.rows import collect_rows, scatter_rows
from tests.support import generated, layers
from tests.support.partitioned import EXACT, compiled_for, error


def compiled(name: str, plan: str):
    return compiled_for(name, plan)


def ops(program: Program) -> Counter[str]:
    targets = (all_reduce, scatter_rows, collect_rows)
    return Counter(node.target.__name__ for node in program.graph.nodes if node.target in targets)


@pytest.mark.parametrize("tp", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
def test_every_reduction_is_scattered_and_collected(name: str, tp: int) -> None:
    parts = compiled(name, f"tp={tp},sequence-parallel")
    before = ops(compiled(name, f"tp={tp}").program)["all_reduce"]
    assert ops(parts.program) == {"scatter_rows": before, "collect_rows": before}
    for length in (1, 2, 7):  # fewer tokens than ranks, and as many on each or not
        assert error(name, parts, length) < EXACT


def test_two_norms_of_one_sum_are_collected_each() -> None:
    parts = compiled("gpt_neox", "tp=2,sequence-parallel")
    assert ops(parts.program) == {"scatter_rows": 3, "collect_rows": 5}
    assert error("gpt_neox", parts, 5) < EXACT


def test_prompts_have_rows_and_single_tokens_do_not() -> None:
    parts = compiled("llama", "tp=3,sequence-parallel")
    assert generated.error("llama", parts, generated.prompts("llama", (1, 5, 11)), new=4) < 1e-9
    assert ops(parts.program_of("prefill"))["scatter_rows"] == ops(parts.program_of("decode"))["all_reduce"] == 5
    assert not ops(parts.program_of("decode"))["scatter_rows"]


@pytest.mark.parametrize("exchange", ["replicate", "exchange"])
def test_with_experts(exchange: str) -> None:
    parts = compiled("mixtral", f"tp=2,ep=2,sequence-parallel,expert-parallel.exchange={exchange}")
    assert ops(parts.program)["all_reduce"] == 0
    assert error("mixtral", parts, 5) < EXACT


@pytest.mark.parametrize("tp", [2, 4])
def test_bytes_are_those_of_the_reductions_replaced(tp: int) -> None:
    sizes = {"batch": 2, "sequence": 12}
    costs = []
    for plan in (f"tp={tp}", f"tp={tp},sequence-parallel"):
        program = compiled("llama", plan).program
        program_cost(program, {"tp": 0}, sizes)  # every communicating op has a cost
        sent = 0.0
        for node in program.graph.nodes:
            if node.target in (all_reduce, scatter_rows, collect_rows):
                share = 2 if node.target is all_reduce else 1
                sent += share * (tp - 1) / tp * 2 * 12 * node.meta["val"].shape[-1]
        costs.append(sent)
    assert costs[0] == costs[1]


def test_one_rank_is_left_as_it_is() -> None:
    assert not ops(compiled("llama", "tp=1,sequence-parallel").program)


class ShapedAs(nn.Module):
    """Normed over all that a token has, in a shape of its own; then in that of a value with a rank's own tokens."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.norm, self.out = nn.Linear(hidden, 9), nn.GroupNorm(1, 9), nn.Linear(9, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return self.out(self.norm(y.flatten(0, 1)).view_as(y))


def test_what_takes_the_shape_of_another_has_the_same_tokens() -> None:
    parts, difference = layers.partitioned(layers.layered_once(ShapedAs), 2, passes=["sequence-parallel"])
    assert ops(parts.program)["scatter_rows"] > 0
    assert difference < EXACT


# -- negative controls -------------------------------------------------------------------------------------------------


def broken(change) -> None:
    program = compiled("llama", "tp=2,sequence-parallel").program
    check(program)
    change(program, {op: [n for n in program.graph.nodes if n.target is op] for op in (scatter_rows, collect_rows)})
    check(program)


def test_own_tokens_where_all_are_needed_are_refused() -> None:
    def uncollected(program, nodes):
        node = nodes[collect_rows][0]
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)

    with pytest.raises(LayoutError):
        broken(uncollected)


def test_a_sum_that_is_not_scattered_is_refused() -> None:
    def whole(program, nodes):
        nodes[scatter_rows][1].target, nodes[scatter_rows][1].kwargs = all_reduce, {}
        del nodes[scatter_rows][1].meta["layout"]

    with pytest.raises(LayoutError):
        broken(whole)


def test_another_dim_than_that_of_the_tokens_is_refused() -> None:
    def other(program, nodes):
        nodes[scatter_rows][0].kwargs = {"dim": 0, "kind": "sequence"}
        del nodes[scatter_rows][0].meta["layout"]

    with pytest.raises(LayoutError):
        broken(other)


def test_tokens_of_the_wrong_number_are_refused() -> None:
    def total(program, nodes):
        node = nodes[collect_rows][0]
        node.args = (node.args[0], 2, *node.args[2:])

    with pytest.raises(LayoutError, match="its total"):
        broken(total)


def test_sequences_that_are_not_equal_would_be_told() -> None:
    """The comparison sees one token in the wrong place."""
    parts = compiled("llama", "tp=2,sequence-parallel")
    ids = torch.arange(3, 11, device="cpu")[None]
    one = parts.simulate(input_ids=ids)
    assert not torch.allclose(one, one.roll(1, dims=1), atol=1e-6)
