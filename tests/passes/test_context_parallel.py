"""The context-parallel pass: each rank has its own tokens, only attention looks at others', nothing else changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from partitioner import Plan
from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.errors import LayoutError, PlanError
from partitioner.program.program import Program
from partitioner.proof.layouts import check
from runtime.ops.attention import attention
from runtime.ops.collectives import all_reduce
from runtime.ops.communicating import COMMUNICATING
from runtime.ops.rows.sequence_attention import sequence_attention
from runtime.ops.rows.share_rows import collect_rows, take_rows
from tests.support import generated, reference
from tests.support.partitioned import EXACT, compiled_for, error, traced

WAYS = ("ring", "gather", "ulysses")


def compiled(name: str, plan: str, *, odd: bool = False):
    return compiled_for(name, plan, odd=odd)


def ops(program: Program) -> Counter[str]:
    """The ops that communicate, and attention that does not."""
    targets = (*COMMUNICATING, attention)
    return Counter(node.target.__name__ for node in program.graph.nodes if node.target in targets)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sp", [2, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_attention_is_over_all_ranks_and_nothing_else_is(name: str, sp: int, way: str) -> None:
    parts = compiled(name, f"sp={sp},sp_attention={way}")
    assert ops(parts.program) == {"sequence_attention": 2, "collect_rows": 1}  # the logits
    assert all(node.kwargs["how"] == way for node in parts.program.graph.nodes if node.target is sequence_attention)
    for length in (1, 2, 5, 33, 40):  # fewer tokens than ranks, and as many on each or not
        assert error(name, parts, length) < EXACT


@pytest.mark.parametrize(
    ("name", "odd", "plan"),
    [
        ("llama", True, "tp=2,sp=2,sp_attention=ulysses"),  # 6 heads over 3, shared by two ranks of tp
        ("llama", True, "tp=4,sp=2,sp_attention=ulysses"),  # 1 or 2 heads on a rank of tp
        ("llama", True, "sp=4,sp_attention=ulysses"),  # fewer kv heads than ranks
        pytest.param("qwen3", True, "tp=3,sp=2,sp_attention=ring", marks=pytest.mark.slow),
        ("falcon", False, "tp=2,sp=2,sp_attention=gather"),  # one kv head
        ("gemma2", False, "tp=2,sp=2,sp_attention=ring"),  # windows and a soft cap
        ("gpt_oss", False, "sp=3,sp_attention=ring"),  # windows and sinks; experts
        ("gpt_oss", False, "tp=2,sp=2,sp_attention=ulysses"),
        ("deepseek_v3", False, "sp=2,sp_attention=gather"),  # keys wider than values; experts, some for all
        pytest.param("deepseek_v3", False, "tp=2,sp=2", marks=pytest.mark.slow),
        pytest.param("mixtral", False, "tp=2,sp=3", marks=pytest.mark.slow),
        ("opt", False, "sp=3"),  # a table of positions
    ],
)
def test_with_tensor_parallelism_and_all_that_attention_has(name: str, odd: bool, plan: str) -> None:
    parts = compiled(name, plan, odd=odd)
    for length in (1, 5, 40):
        assert error(name, parts, length, odd=odd) < EXACT


@pytest.mark.parametrize("way", WAYS)
def test_an_encoder_with_padding(way: str) -> None:
    name = "masked:bert"
    parts, model = compiled(name, f"sp=3,sp_attention={way}"), traced(name)[0]
    ids = torch.arange(3, 3 + 2 * 11).reshape(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    found = parts.simulate(input_ids=ids, attention_mask=mask)
    expected = reference.forward(model, lifted=True, input_ids=ids, attention_mask=mask)
    assert difference(found[0], expected[0]) < EXACT
    assert difference(found[1, :7], expected[1, :7]) < EXACT


def test_positions_that_are_given_are_those_of_a_ranks_own_tokens() -> None:
    parts, model = compiled("llama", "sp=2"), traced("llama")[0]
    ids = torch.arange(3, 14)[None]
    positions = torch.arange(11)[None] + 3
    expected = reference.forward(model, lifted=True, input_ids=ids, position_ids=positions)
    assert difference(parts.simulate(input_ids=ids, position_ids=positions), expected) < EXACT


def test_auto_takes_what_is_priced_lowest_and_says_why() -> None:
    def chosen(name: str, plan: str) -> tuple[str, str]:
        parts = compiled(name, plan)
        (node, *_) = [n for n in parts.program.graph.nodes if n.target is sequence_attention]
        (note,) = [note for note in parts.report.notes if note.startswith("tokens over sp")]
        return node.kwargs["how"], note

    how, note = chosen("gpt2", "sp=2")
    assert how == "ring"
    assert "16,384 tokens a rank on GPUs of one host are 0.211 ms of attention" in note
    how, note = chosen("gemma2", "sp=2")
    assert how == "ring"
    assert "soft cap" in note
    how, note = chosen("llama", "tp=4,sp=2")
    assert how == "ring"
    assert "1 heads on a rank, fewer than 2" in note
    assert "by the plan" in chosen("gpt2", "sp=2,sp_attention=gather")[1]


@pytest.mark.parametrize(
    ("name", "plan", "neighbours"),
    [
        pytest.param("llama", "sp=4,sp_attention=ring-ulysses", 2, marks=pytest.mark.slow),
        ("llama", "sp=6,sp_attention=ring-ulysses", 3),
        ("gemma2", "tp=2,sp=4,sp_attention=ring-ulysses", 2),  # windows and a soft cap
        (
            "llama",
            "sp=6,sp_attention=ring-ulysses,context-parallel.neighbours=2",
            2,
        ),
    ],
)
def test_rings_of_ranks_that_exchange_heads(name: str, plan: str, neighbours: int) -> None:
    parts = compiled(name, plan)
    nodes = [n for n in parts.program.graph.nodes if n.target is sequence_attention]
    assert {(n.kwargs["how"], n.kwargs["neighbours"]) for n in nodes} == {("ring-ulysses", neighbours)}
    for length in (1, 5, 33):
        assert error(name, parts, length) < EXACT
    assert generated.error(name, parts, generated.prompts(name, (1, 5, 11)), new=2, prefill_step=6) < 1e-9


def test_a_ring_of_groups_that_do_not_make_up_the_ranks_is_refused() -> None:
    def other(program: Program, nodes: Any) -> None:
        (node, *_) = nodes[sequence_attention]
        node.kwargs = {**node.kwargs, "neighbours": 3}

    with pytest.raises(LayoutError, match="exchanges heads between 3 of 4 ranks"):
        broken(other, "sp=4,sp_attention=ring-ulysses")


def test_one_rank_is_left_as_it_is() -> None:
    assert ops(compiled("llama", "sp=1").program) == {"attention": 2}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("mpt", "matmul in transformer.blocks.0.attn"),
        pytest.param("openai-gpt", "transformer.h.0.attn", marks=pytest.mark.slow),
    ],
)
def test_a_model_whose_tokens_meet_elsewhere_is_refused_with_the_node(name: str, node: str) -> None:
    """Scores whose alibi has a size that depends on the tokens, and scores times a table, are not known to be such."""
    with pytest.raises(PlanError, match=node) as caught:
        compiled(name, "sp=2")
    assert "only attention may look from one token at another" in str(caught.value)


def test_a_model_of_one_length_is_refused() -> None:
    program = traced("llama")[1].copy()
    program.symbols = {"batch": program.symbols["batch"]}
    with pytest.raises(PlanError, match="captured for one length only"):
        compile_program(program, Plan(sp=2))


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ("sp=2,sp_attention=rings", "must be one of auto, ring, gather, ulysses, ring-ulysses"),
        ("sp=3,sp_attention=ring-ulysses", "product of two numbers above 1"),
        (
            "tp=2,sp=6,sp_attention=ring-ulysses,context-parallel.neighbours=4",
            "4 ranks that exchange heads: required is a factor of 6",
        ),
        ("sp=2,sp_attention=ring,context-parallel.attention=gather", "attention=gather: give one of them"),
        ("tp=4,sp=4,sp_attention=ring-ulysses", "no number of ranks that exchange heads"),  # one head each
        ("tp=2,sp_attention=ring", "sp is 1"),
    ],
)
def test_plans_that_do_not_go_together_are_refused(plan: str, why: str) -> None:
    with pytest.raises(PlanError, match=why):
        compiled("mixtral", plan)


def test_a_plan_is_what_its_text_says() -> None:
    plan = Plan(sp=4, tp=2, sp_attention="ring")
    assert Plan.parse(str(plan)) == plan
    assert eval(repr(plan), {"Plan": Plan}) == plan
    assert str(Plan.parse("sp=2")) == "sp=2"


# -- negative controls -------------------------------------------------------------------------------------------------


def broken(change: Any, plan: str = "tp=2,sp=2") -> None:
    program = compiled("llama", plan).program
    check(program)
    kinds = (take_rows, collect_rows, sequence_attention, all_reduce)
    change(program, {op: [n for n in program.graph.nodes if n.target is op] for op in kinds})
    for node in program.graph.nodes:
        node.meta.pop("layout", None)  # what the pass said is not what is tested
    check(program)


def test_tokens_of_all_ranks_where_own_are_meant_are_refused() -> None:
    def whole(program: Program, nodes: Any) -> None:
        node = nodes[take_rows][1]  # the positions, say
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)

    with pytest.raises(LayoutError):
        broken(whole)


def test_another_order_is_refused() -> None:
    def blocks(program: Program, nodes: Any) -> None:
        nodes[take_rows][0].kwargs = {**nodes[take_rows][0].kwargs, "order": "blocks"}

    with pytest.raises(LayoutError, match="rows meet other ranks' rows"):
        broken(blocks)


def test_another_order_of_the_result_is_refused() -> None:
    def blocks(program: Program, nodes: Any) -> None:
        nodes[collect_rows][0].kwargs = {"dim": 1}

    with pytest.raises(LayoutError, match="collects blocks rows"):
        broken(blocks)


def test_another_axis_of_equal_size_is_refused() -> None:
    def over_tp(program: Program, nodes: Any) -> None:
        (node, *_) = nodes[sequence_attention]
        node.args = (*node.args[:-1], "tp")

    with pytest.raises(LayoutError, match="sequence rows of tp"):
        broken(over_tp)


def test_attention_to_own_tokens_only_is_refused() -> None:
    def own(program: Program, nodes: Any) -> None:
        (node, *_) = nodes[sequence_attention]
        node.target, node.args = attention, node.args[:3]
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("how", "parts", "order")}

    with pytest.raises(LayoutError, match="requires its operand"):
        broken(own)


def test_the_number_of_own_tokens_is_no_total() -> None:
    def own(program: Program, nodes: Any) -> None:
        (node, *_) = nodes[sequence_attention]
        with program.graph.inserting_before(node):
            size = program.graph.call_function(torch.ops.aten.sym_size.int, (node.args[0], 2))
        size.meta = {"val": program.symbols["sequence"]}
        node.args = (*node.args[:3], size, *node.args[4:])

    with pytest.raises(LayoutError, match="is told that all ranks have"):
        broken(own)


def test_a_result_of_own_tokens_is_refused() -> None:
    def uncollected(program: Program, nodes: Any) -> None:
        (node,) = nodes[collect_rows]
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)

    with pytest.raises(LayoutError, match="output"):
        broken(uncollected)


def test_another_number_of_ranks_is_refused() -> None:
    def parts(program: Program, nodes: Any) -> None:
        (node, *_) = nodes[sequence_attention]
        node.kwargs = {**node.kwargs, "parts": 3}

    with pytest.raises(LayoutError, match="tokens of 3 ranks"):
        broken(parts)


def test_tokens_in_another_order_would_be_told() -> None:
    """The comparison sees one token in the wrong place."""
    one = compiled("llama", "sp=2").simulate(input_ids=torch.arange(3, 11)[None])
    assert not torch.allclose(one, one.roll(1, dims=1), atol=1e-6)
