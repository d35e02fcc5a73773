"""The data-parallel pass: ranks that share out experts over dp run sequences of their own, and meet in the experts."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from partitioner import Parts, Plan
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import LayoutError
from partitioner.program.program import Program, State
from partitioner.proof.float64 import in_float64
from partitioner.proof.layouts import check
from partitioner.proof.rows import check_rows
from partitioner.sharding.layout import REPLICATED, Rows
from passes import data_parallel
from passes.expert_parallel import ExpertParallel
from runtime.ops.collectives import all_reduce
from runtime.ops.expert_exchange import expert_return, expert_send, localise_experts
from runtime.ops.rows import collect_rows, scatter_rows, take_rows
from runtime.ops.rows.share_rows import own_last_token
from tests.support import zoo

OPS = (all_reduce, expert_return, expert_send, collect_rows, scatter_rows, take_rows, localise_experts)
OWN = Rows(("dp",), "batch")


@functools.cache
def traced() -> Program:
    """One layer; seven experts, of which each token has three."""
    model, _ = zoo.tiny("qwen3_moe", num_experts=7, num_experts_per_tok=3, num_hidden_layers=1)
    return in_float64(trace(model))


@functools.cache
def compiled(plan: str) -> Parts[Any]:
    return compile_program(traced(), Plan.parse(plan))


def program(plan: str, entry: Any = "prefill") -> Program:
    return compiled(plan).program_of(entry)


def ops(found: Program) -> dict[str, int]:
    """What the routed experts do with other ranks."""
    nodes = [node for node in found.graph.nodes if "mlp" in str(node.meta.get("path") or "")]
    return dict(Counter(node.target.__name__ for node in nodes if node.target in OPS))


SENT = ",expert-parallel.exchange=exchange"
GATHERED = {"collect_rows": 3, "localise_experts": 1, "scatter_rows": 1}


def test_tokens_of_few_ranks_are_gathered() -> None:
    assert ops(program("ep=2")) == ops(program("ep=2", "decode")) == GATHERED
    assert ops(program("tp=2,ep=4")) == ops(program("tp=2,ep=4", "decode")) == {**GATHERED, "all_reduce": 1}


def test_prompts_are_sent_to_experts() -> None:
    assert ops(program("ep=2" + SENT)) == {"expert_send": 1, "expert_return": 1}
    # over dp and tp: of what every rank of tp has, each sends its part; sums over tp are completed as before
    sent = {"take_rows": 3, "expert_send": 1, "expert_return": 1, "collect_rows": 1}
    assert ops(program("tp=2,ep=4" + SENT)) == sent
    # each rank of tp with its counterpart
    assert ops(program("tp=2,ep=2,etp=2" + SENT)) == {"expert_send": 1, "expert_return": 1, "all_reduce": 1}


def chosen(plan: str, **changes: Any) -> str:
    """The exchange that prompts get."""
    given = replace(traced(), mesh=Plan.parse(plan).mesh, **changes)
    return ExpertParallel().for_entry("prefill", given).exchange


def test_auto_sends_where_rows_outweigh_what_a_call_costs() -> None:
    assert [chosen(plan) for plan in ("ep=2", "ep=4", "ep=7")] == ["gather"] * 3
    assert chosen("ep=1024") == "exchange"
    # prompts are not filled up where that would change a state, nor where ranks keep tokens of their own
    state = State("a", (3,), torch.float64, REPLICATED(1), per_token=False)
    assert chosen("ep=2", states={"a": state}) == chosen("sp=2,ep=4") == "exchange"


@pytest.mark.parametrize(
    ("plan", "entry", "alike"),
    [("ep=2", "decode", True), ("ep=2", "prefill", False), ("tp=2,ep=4", "decode", False)],  # over tp: parts of 3 of 2
)
def test_single_tokens_are_alike_where_whole_sequences_are_sent(plan: str, entry: str, *, alike: bool) -> None:
    found = program(f"{plan},expert-parallel.exchange=exchange", entry)
    (send,) = [node for node in found.graph.nodes if node.target is expert_send]
    assert send.kwargs.get("alike", False) is alike


def test_inputs_states_and_logits_are_of_own_sequences() -> None:
    for entry in ("prefill", "decode"):
        found = program("tp=2,ep=4", entry)
        assert found.batch_axes == ("dp",)
        assert found.output is not None
        assert found.output.dims[0] == OWN
        (attention,) = [node for node in found.graph.nodes if "state" in node.kwargs]
        assert attention.meta["layout"].dims[0] == OWN
        check_rows(found)


def test_own_tokens_of_own_sequences() -> None:
    """Over sp as well: what is sent over both is a rank's own."""
    found = program("sp=2,ep=4")
    own = OWN.again(("sp",), "sequence", "zigzag")
    (send,) = [node for node in found.graph.nodes if node.target is expert_send]
    assert send.args[0].meta["layout"].dims == (own, None)
    assert ops(found) == {"expert_send": 1, "expert_return": 1}
    (attention,) = [node for node in found.graph.nodes if "state" in node.kwargs]
    assert attention.meta["layout"].dims == (OWN, None, Rows(("sp",), "sequence", "zigzag"), None)
    gathered = {"collect_rows": 3, "localise_experts": 1, "scatter_rows": 1}
    assert ops(program("sp=2,ep=4", "decode")) == {**gathered, "all_reduce": 1}
    check_rows(found)


@pytest.mark.slow
def test_own_tokens_of_own_sequences_where_others_have_the_same() -> None:
    """What is sent over dp alone are the tokens of all ranks of sp."""
    sent = {"take_rows": 3, "expert_send": 1, "expert_return": 1, "collect_rows": 1}
    assert ops(program("sp=2,tp=2,ep=8")) == sent
    # parts of an expert's matrices are over sp, whose ranks bring their tokens together for them
    divided = program("sp=2,ep=2,etp=2")
    (send,) = [node for node in divided.graph.nodes if node.target is expert_send]
    assert send.args[0].meta["layout"].dims == (OWN, None)
    for each in (divided, program("pp=2,sp=2,ep=4", "decode")):
        check_rows(each)


def test_stages_hand_on_what_is_of_own_sequences() -> None:
    found = compile_program(traced(), Plan.parse("pp=2,ep=2,pipeline.stage_starts=[model.norm]"))
    first, last = found.entry("prefill", 0), found.entry("prefill", 1)
    assert first.batch_axes == last.batch_axes == ("dp",)
    assert first.stage is not None
    assert [crossing.rows for crossing in first.stage.sends] == [()]


def test_the_whole_text_is_as_it_was() -> None:
    parts = compiled("ep=2")
    assert parts.program.batch_axes == ()
    assert any("are given one batch" in note for note in parts.program.notes)
    assert any("have sequences of their own" in note for note in program("ep=2").notes)


@pytest.mark.parametrize(
    "plan",
    [
        "ep=2,expert-parallel.exchange=replicate",
        "tp=3,ep=2",  # groups that go across those of attention
        pytest.param("dp=2,tp=2,ep=2", marks=pytest.mark.slow),  # replicas, which are worlds of their own
        pytest.param("tp=2,ep=2", marks=pytest.mark.slow),
        pytest.param("tp=2,ep=4,sequence-parallel", marks=pytest.mark.slow),
        # prompts would be filled up, where each rank of sp keeps its own tokens
        pytest.param("sp=2,ep=4,expert-parallel.exchange=gather", marks=pytest.mark.slow),
    ],
)
def test_one_batch_stays_one(plan: str) -> None:
    assert program(plan).batch_axes == ()


def test_what_needs_all_sequences_keeps_them_in_both_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    works = data_parallel.works_row_by_row

    def fussy(node: Any, *given: Any) -> bool:
        return not any(n.target is expert_send for n in node.graph.nodes) and works(node, *given)

    monkeypatch.setattr(data_parallel, "works_row_by_row", fussy)
    parts = compile_program(traced(), Plan.parse("ep=2" + SENT))
    for entry in ("prefill", "decode"):
        found: Program = parts.program_of(entry)  # type: ignore[arg-type]
        assert found.batch_axes == ()
        assert any("cannot have sequences of their own" in note and "no row for each" in note for note in found.notes)


# -- negative controls -------------------------------------------------------------------------------------------------


def broken(plan: str, entry: str, change: Callable[[Program, dict[Any, list[Any]]], None]) -> None:
    found = program(plan, entry).copy()
    check(found)
    change(found, {op: [n for n in found.graph.nodes if n.target is op] for op in OPS})
    for node in found.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key != "layout"}
    check(found)


def without(found: Program, node: Any) -> None:
    node.replace_all_uses_with(node.args[0])
    found.graph.erase_node(node)


@pytest.mark.parametrize("op", [collect_rows, scatter_rows])
def test_gathered_experts_need_the_tokens_of_all(op: Any) -> None:
    with pytest.raises(LayoutError):
        broken("ep=2", "decode", lambda found, nodes: without(found, nodes[op][0]))


def test_as_many_rows_of_each_rank_are_collected() -> None:
    def fewer(found: Program, nodes: Any) -> None:
        total = nodes[collect_rows][0].args[1]
        total.args = (total.args[0], 3)

    with pytest.raises(LayoutError, match="collects as many rows of each rank"):
        broken("ep=2", "decode", fewer)


def test_a_sum_over_ranks_with_other_sequences_is_refused() -> None:
    def summed(found: Program, nodes: Any) -> None:
        node = nodes[all_reduce][0]
        node.args = (node.args[0], ("dp", "tp"))

    with pytest.raises(LayoutError, match=r"sums .* over 'dp'"):
        broken("tp=2,ep=4", "prefill", summed)


def test_own_sequences_as_if_they_were_everybodys_are_refused() -> None:
    """The program as it stands, but for what it says of its inputs."""
    found = program("ep=2").copy()
    found.batch_axes = ()
    with pytest.raises(LayoutError):
        check(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "op"), [("sp=2,tp=2,ep=8", take_rows), ("sp=2,tp=2,ep=8", collect_rows), ("sp=2,ep=2,etp=2", collect_rows)]
)
def test_own_tokens_need_each_op_that_deals_them_out(plan: str, op: Any) -> None:
    with pytest.raises(LayoutError):
        broken(plan, "prefill", lambda found, nodes: without(found, nodes[op][-1]))


@pytest.mark.slow
def test_own_tokens_are_counted_by_what_has_them() -> None:
    """What the ranks of tp collect is as much as the rank has of its sequences, not all that these have."""

    def more(found: Program, nodes: Any) -> None:
        node = next(n for n in nodes[collect_rows] if n.args[2] == "tp")
        total = next(n for n in found.graph.nodes if n.meta.get("val") == node.args[1].meta["val"] and n is not node)
        first = next(n for n in found.graph.nodes if n.op == "placeholder")
        sizes = [found.graph.call_function(torch.ops.aten.sym_size.int, (first, dim)) for dim in (0, 1)]
        for size, value in zip(sizes, first.meta["val"].shape, strict=True):
            size.meta = {"val": value, "path": ""}
        made = found.graph.call_function(operator.mul, tuple(sizes))
        made.meta = dict(total.meta)
        for each in (*sizes, made):
            node.prepend(each)
        node.args = (node.args[0], made, *node.args[2:])

    with pytest.raises(LayoutError, match="collects"):
        broken("sp=2,tp=2,ep=8", "prefill", more)


def test_the_last_token_is_no_sum_over_other_sequences() -> None:
    def over_both(found: Program, nodes: Any) -> None:
        node = next(n for n in nodes[all_reduce] if n.args[0].target is own_last_token)
        node.args = (node.args[0], ("dp", "sp"))

    with pytest.raises(LayoutError, match=r"sums .* over 'dp'"):
        broken("sp=2,ep=4", "prefill", over_both)
