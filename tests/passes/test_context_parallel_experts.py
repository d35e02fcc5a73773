"""Tokens over sp where experts are dealt out: own tokens as far as that goes, elsewhere those of all ranks."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from typing import Any

import pytest
import torch

from partitioner import Plan
from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import LayoutError
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from partitioner.proof.layouts import check
from partitioner.sharding.layout import Rows
from passes.expert_parallel import ExpertParallel, choose
from runtime.ops.collectives import all_reduce
from runtime.ops.expert_exchange import expert_return, expert_send, localise_experts
from runtime.ops.rows import collect_rows, scatter_rows, take_rows
from tests.support import reference, zoo

EXACT = 1e-10
OPS = (all_reduce, expert_return, expert_send, collect_rows, scatter_rows, take_rows, localise_experts)


@functools.cache
def traced(name: str) -> tuple[Any, Program]:
    """One layer; seven experts, of which each token has three, so that ranks have uneven numbers of them."""
    seven = {"num_experts": 7, "num_experts_per_tok": 3, "num_hidden_layers": 1} if name == "qwen3_moe" else {}
    model, _ = zoo.tiny(name, **seven)
    return model, in_float64(trace(model))


@functools.cache
def compiled(name: str, degrees: str, exchange: str) -> Any:
    plan = Plan.parse(degrees)
    others = {axis: plan.degree(axis) for axis in ("pp", "sp", "tp", "ep", "etp")}
    passes = [ExpertParallel(exchange=exchange), *(each for each in plan.passes)]
    return compile_program(traced(name)[1], Plan(**others, passes=passes))


def error(name: str, degrees: str, exchange: str, *lengths: int) -> float:
    worst = 0.0
    for length in lengths:
        ids = torch.randint(3, 120, (2, length), generator=torch.Generator().manual_seed(length), device="cpu")
        expected = reference.forward(traced(name)[0], lifted=True, input_ids=ids)
        worst = max(worst, difference(compiled(name, degrees, exchange).simulate(input_ids=ids), expected))
    return worst


def ops(name: str, degrees: str, exchange: str) -> dict[str, int]:
    """What the routed experts of a layer do with other ranks."""
    nodes = [n for n in compiled(name, degrees, exchange).program.graph.nodes if "mlp" in str(n.meta.get("path") or "")]
    return dict(Counter(n.target.__name__ for n in nodes if n.target in OPS))


@pytest.mark.parametrize("exchange", ["replicate", "exchange"])
@pytest.mark.parametrize(
    "degrees",
    [
        "sp=2,ep=2",
        pytest.param("sp=3,ep=3", marks=pytest.mark.slow),
        "sp=2,tp=2,ep=2",  # experts over tp: own tokens of sp
        "sp=2,tp=2,ep=4",
        "sp=2,ep=2,tp=2,etp=2",
        "sp=2,tp=2,etp=4",  # an expert's matrices over sp
        "sp=2,ep=4",  # experts over dp as well
        "sp=2,tp=3,ep=2",  # groups that go across those of attention
        pytest.param("sp=2,tp=2,ep=2,etp=4", marks=pytest.mark.slow),
        pytest.param("sp=4,tp=3,ep=2,etp=3", marks=pytest.mark.slow),
        "sp=2,tp=2,ep=4,sequence-parallel",
    ],
)
def test_equal_to_the_whole(degrees: str, exchange: str) -> None:
    assert error("qwen3_moe", degrees, exchange, 1, 7) < EXACT


@pytest.mark.parametrize("exchange", ["replicate", "exchange"])
def test_shared_experts_of_own_tokens_beside_routed_ones_of_all(exchange: str) -> None:
    assert error("deepseek_v3", "sp=2,tp=2,ep=4", exchange, 5) < EXACT


def test_tokens_that_are_sent_are_a_ranks_own() -> None:
    # nothing is taken, and nothing collected: the ranks of sp have other tokens already
    assert ops("qwen3_moe", "sp=2,ep=2", "exchange") == {"expert_send": 1, "expert_return": 1}
    # over tp they are alike: half of own tokens each, which come together again
    assert ops("qwen3_moe", "sp=2,tp=2,ep=4", "exchange") == {
        "take_rows": 3, "expert_send": 1, "expert_return": 1, "collect_rows": 1,
    }  # fmt: skip
    send = next(
        n for n in compiled("qwen3_moe", "sp=2,tp=2,ep=4", "exchange").program.graph.nodes if n.target is expert_send
    )
    own = Rows(("sp",), "sequence", "zigzag")
    assert send.args[0].meta["layout"].dims[0] == own.again(("tp",), "tokens")


def test_ranks_with_other_tokens_need_not_meet() -> None:
    assert ops("qwen3_moe", "sp=2,tp=2,ep=2", "replicate") == {"localise_experts": 1, "all_reduce": 1}


def test_experts_over_sp_get_the_tokens_of_all_and_give_back_sums() -> None:
    assert ops("qwen3_moe", "sp=2,ep=2", "replicate") == {"collect_rows": 3, "localise_experts": 1, "scatter_rows": 1}
    assert ops("qwen3_moe", "sp=2,tp=2,ep=4", "replicate") == {
        "collect_rows": 3, "localise_experts": 1, "scatter_rows": 1, "all_reduce": 1,
    }  # fmt: skip


def test_rows_of_tp_are_dealt_out_of_own_tokens() -> None:
    program = compiled("qwen3_moe", "sp=2,tp=2,ep=4,sequence-parallel", "replicate").program
    scattered = [n for n in program.graph.nodes if n.target is scatter_rows and n.args[1] == "tp"]
    assert scattered
    own = Rows(("sp",), "sequence", "zigzag")
    assert all(n.meta["layout"].dims[1] == own.again(("tp",), "sequence") for n in scattered)


def test_own_tokens_make_an_exchange_cheaper() -> None:
    """Nothing is collected: of 4 experts, two of which a token has, over two ranks."""
    assert choose(2, 4, 2, "text") == "replicate"
    assert choose(2, 4, 2, "text", own=2) == "exchange"
    assert choose(2, 4, 2, "decode", own=2) == "replicate"


# -- negative controls -------------------------------------------------------------------------------------------------


def broken(change: Any, degrees: str, exchange: str) -> None:
    program = compiled("qwen3_moe", degrees, exchange).program.copy()
    check(program)
    change(program, {op: [n for n in program.graph.nodes if n.target is op] for op in OPS})
    for node in program.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key != "layout"}
    check(program)


def without(program: Program, node: Any) -> None:
    node.replace_all_uses_with(node.args[0])
    program.graph.erase_node(node)


def test_sums_that_are_not_dealt_out_are_refused() -> None:
    with pytest.raises(LayoutError):
        broken(lambda program, nodes: without(program, nodes[scatter_rows][0]), "sp=2,ep=2", "replicate")


def test_sums_dealt_out_in_another_order_are_refused() -> None:
    def blocks(program: Program, nodes: Any) -> None:
        node = nodes[scatter_rows][0]
        node.kwargs = {**node.kwargs, "order": "blocks"}

    with pytest.raises(LayoutError):
        broken(blocks, "sp=2,ep=2", "replicate")


def test_experts_over_sp_of_own_tokens_are_refused() -> None:
    def own(program: Program, nodes: Any) -> None:
        for node in nodes[collect_rows]:
            if any(user.target is localise_experts for user in node.users):
                without(program, node)

    with pytest.raises(LayoutError):
        broken(own, "sp=2,ep=2", "replicate")


@pytest.mark.parametrize("number", [1, 3])
def test_another_number_of_sequences_is_refused(number: int) -> None:
    def other(program: Program, nodes: Any) -> None:
        node = nodes[scatter_rows][0]
        node.args = (*node.args[:2], number)

    with pytest.raises(LayoutError, match="deals out its dim"):
        broken(other, "sp=2,ep=2", "replicate")


def test_tokens_that_all_ranks_of_tp_send_are_refused() -> None:
    """Each would be computed twice."""

    def alike(program: Program, nodes: Any) -> None:
        for node in nodes[take_rows]:
            if node.kwargs["axes"] == ["tp"]:
                without(program, node)

    with pytest.raises(LayoutError):
        broken(alike, "sp=2,tp=2,ep=4", "exchange")


def test_the_number_of_all_tokens_is_not_that_of_own_ones() -> None:
    def total(program: Program, nodes: Any) -> None:
        (node,) = [n for n in nodes[collect_rows] if n.args[2] == "tp"]
        (ids,) = [n for n in program.graph.nodes if n.op == "placeholder" and n.target == "input_ids"]
        with program.graph.inserting_before(node):
            size = program.graph.call_function(torch.ops.aten.sym_size.int, (ids, 1))
            batch = program.graph.call_function(torch.ops.aten.sym_size.int, (ids, 0))
            every = program.graph.call_function(operator.mul, (batch, size))
        symbols = program.symbols
        size.meta, batch.meta = {"val": symbols["sequence"]}, {"val": symbols["batch"]}
        every.meta = {"val": symbols["batch"] * symbols["sequence"]}
        node.args = (node.args[0], every, *node.args[2:])

    with pytest.raises(LayoutError, match=r"collects .* rows of the sequence rows of sp"):
        broken(total, "sp=2,tp=2,ep=4", "exchange")
