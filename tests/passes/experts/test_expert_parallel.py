"""The expert-parallel pass: equal to the whole in float64, however experts are dealt and tokens come to them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from partitioner import Plan
from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import LayoutError, PlanError
from partitioner.program.balance import deal
from partitioner.program.program import PerRankInt, Program
from partitioner.proof.float64 import in_float64
from partitioner.proof.layouts import check
from partitioner.sharding.layout import Split
from passes.expert_parallel import ExpertParallel, choose
from runtime.communication.matching_calls import Call
from runtime.communication.thread_communicator import ThreadGroup
from runtime.ops.expert_exchange import expert_return, expert_send, localise_experts
from runtime.ops.experts import expert_combine, grouped_linear
from tests.support import reference, zoo

EXACT = 1e-10
EXPERTS = 7


@functools.cache
def seven() -> tuple[Any, Program]:
    """Seven experts, of which each token has three."""
    model, _ = zoo.tiny("qwen3_moe", num_experts=EXPERTS, num_experts_per_tok=3, num_hidden_layers=1)
    return model, in_float64(trace(model))


@functools.cache
def small(name: str) -> tuple[Any, Program]:
    model, _ = zoo.tiny(name)
    return model, in_float64(trace(model))


def error(of: tuple[Any, Program], plan: Plan, *lengths: int) -> float:
    model, traced = of
    parts = compile_program(traced, plan)
    worst = 0.0
    for length in lengths:
        ids = torch.randint(3, 120, (2, length), generator=torch.Generator().manual_seed(length), device="cpu")
        expected = reference.forward(model, lifted=True, input_ids=ids)
        worst = max(worst, difference(parts.simulate(input_ids=ids), expected))
    return worst


def plan(text: str, **options: Any) -> Plan:
    base = Plan.parse(text)
    degrees = {axis: base.degree(axis) for axis in ("pp", "sp", "tp", "ep", "etp")}
    return Plan(**degrees, passes=[ExpertParallel(**options)])


def experts_of(traced: Program, found: Plan) -> dict[str, str]:
    rows = compile_program(traced, found).report.rows
    return {row.pattern: row.split for row in rows if "experts" in row.pattern}


@pytest.mark.parametrize("exchange", ["replicate", "exchange"])
@pytest.mark.parametrize("degrees", ["ep=2", "ep=4", "tp=2,ep=2", "tp=2,ep=4", "tp=2,ep=3", "tp=2,ep=2,etp=2"])
def test_equal_to_the_whole(degrees: str, exchange: str) -> None:
    assert error(seven(), plan(degrees, exchange=exchange), 1, 6) < EXACT


def test_seven_experts_on_four_ranks() -> None:
    found = experts_of(seven()[1], Plan(ep=4))
    assert found
    assert all(split.endswith("over dim 0 as 2/2/2/1") for split in found.values()), found


@pytest.mark.parametrize("exchange", ["replicate", "exchange"])
def test_fewer_experts_than_ranks_stand_with_several(exchange: str) -> None:
    assert error(seven(), plan("ep=9", exchange=exchange), 5) < EXACT


@pytest.mark.parametrize("exchange", ["replicate", "exchange"])
@pytest.mark.parametrize(
    "owners",
    [
        ((0, 1, 2, 3, 4, 5, 6), (3,)),  # a copy
        ((0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 5, 6)),  # all of them copies
        ((0, 1, 2, 3, 4, 5, 6), ()),  # a rank without experts
        ((6,), (0, 2, 4), (1, 3, 5)),  # not in runs
    ],
)
def test_any_owners(owners: tuple[tuple[int, ...], ...], exchange: str) -> None:
    assert error(seven(), plan(f"ep={len(owners)}", exchange=exchange, owners=owners), 1, 7) < EXACT


@pytest.mark.parametrize("exchange", [pytest.param("replicate", marks=pytest.mark.slow), "exchange"])
def test_biases_and_shared_experts(exchange: str) -> None:
    assert error(small("gpt_oss"), plan("ep=3", exchange=exchange), 5) < EXACT  # biases, interleaved, transposed
    assert error(small("deepseek_v3"), plan("tp=2,ep=2", exchange=exchange), 5) < EXACT


def test_routed_and_shared_experts_share_one_reduction() -> None:
    report = compile_program(small("deepseek_v3")[1], plan("tp=2,ep=2", exchange="replicate")).report
    assert {count for layer, count in report.per_layer("all_reduce").items() if layer} == {2}


def test_the_report_says_how_experts_are_dealt() -> None:
    notes = compile_program(seven()[1], Plan(ep=4)).report.notes
    assert any("7 over ep as 2/2/2/1" in note and "replicate" in note for note in notes)
    assert any("the 4 ranks of dp are given one batch" in note for note in notes)
    within_tp = compile_program(seven()[1], Plan(ep=2, tp=2)).report.notes
    assert not any("ranks of dp" in note for note in within_tp)


def test_what_does_not_fit_is_refused() -> None:
    traced = seven()[1]
    for owners in (((0, 1),), ((0, 1, 2), (3, 4, 5)), ((1, 0, 2, 3), (4, 5, 6))):
        with pytest.raises(PlanError, match="owners must be 2 ascending lists that have each of the 7"):
            compile_program(traced, plan("ep=2", owners=owners))
    with pytest.raises(PlanError, match="exchange must be one of"):
        ExpertParallel(exchange="send")
    with pytest.raises(PlanError, match="cannot be dealt out"):
        compile_program(traced, Plan(ep=2, keep_whole=("*experts*",)))


def test_a_model_without_experts_is_refused() -> None:
    for plan, said in (("ep=2", "ep=2 divides"), ("etp=2", "etp=2 divides the matrices of"), ("tp=2,etp=2", "etp=2")):
        with pytest.raises(PlanError, match=f"{said}.* routed experts, and .* has none that were captured"):
            compile_program(small("llama")[1], Plan.parse(plan))


def test_deal() -> None:
    assert [len(mine) for mine in deal(60, 8)] == [8, 8, 8, 8, 7, 7, 7, 7]
    assert deal(2, 3) == ((0,), (0,), (1,))


def test_choose() -> None:
    assert choose(4, 128, 8, "prefill") == "replicate"
    assert choose(32, 128, 2, "prefill") == "exchange"
    assert choose(32, 128, 2, "decode") == "replicate"
    # each rank of etp would send the same rows
    assert (choose(8, 64, 2, "text"), choose(8, 64, 2, "text", parts=2)) == ("exchange", "replicate")
    assert choose(8, 64, 2, "text", shared=True) == "replicate"


def sent_by(parts: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that leave ranks in a run of 3 x 16 tokens: a ring's, of an all-reduce."""
    total = 0
    exchange = ThreadGroup.exchange

    def counting(self: Any, members: tuple[int, ...], call: Call, x: torch.Tensor) -> Any:
        nonlocal total
        others = len(members) - 1
        if call.kind == "all_to_all" and call.counts is not None:
            rows = sum(n for rank, n in zip(members, call.counts[0], strict=True) if rank != call.rank)
            total += rows * x.element_size() * math.prod(x.shape[1:])
        elif call.kind == "all_reduce":
            total += 2 * others * x.nbytes // len(members)
        else:
            total += others * x.nbytes
        return exchange(self, members, call, x)

    with monkeypatch.context() as patch:
        patch.setattr(ThreadGroup, "exchange", counting)
        parts.simulate(input_ids=torch.arange(3, 51, device="cpu").view(3, 16))
    return total


@pytest.mark.parametrize(
    ("name", "chosen"), [("deepseek_v3", "replicate"), pytest.param("mixtral", "exchange", marks=pytest.mark.slow)]
)
def test_a_sum_that_the_layer_needs_anyway_costs_nothing(
    name: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the formula alone, both would exchange; shared experts have partial sums to complete already."""
    sizes = {
        "deepseek_v3": {"n_routed_experts": 16, "n_group": 1, "topk_group": 1},
        "mixtral": {"num_local_experts": 16},
    }
    model, _ = zoo.tiny(name, **sizes[name], num_experts_per_tok=1)
    traced = in_float64(trace(model))
    assert choose(4, 16, 1, "text") == "exchange"
    by_name = {how: compile_program(traced, plan("tp=4,ep=4", exchange=how)) for how in ("replicate", "exchange")}
    auto = compile_program(traced, Plan(tp=4, ep=4))
    assert any(f"exchange: {chosen}" in note for note in auto.report.notes)
    sent = {how: sent_by(parts, monkeypatch) for how, parts in by_name.items()}
    assert min(sent, key=sent.__getitem__) == chosen, sent
    assert sent_by(auto, monkeypatch) == sent[chosen]


# -- negative controls -------------------------------------------------------------------------------------------------


def changed(exchange: str, change: Callable[[Program], None]) -> None:
    parts = compile_program(seven()[1], plan("ep=2", exchange=exchange))
    check(parts.program)
    change(parts.program)
    check(parts.program)


def node_of(program: Program, target: Any) -> Any:
    return next(node for node in program.graph.nodes if node.target is target)


def test_weights_of_other_experts_are_refused() -> None:
    def swap(program: Program) -> None:
        name, layout = next((n, w) for n, w in program.weight_layouts.items() if "experts" in n)
        split = layout.split(0)
        program.weight_layouts[name] = layout.with_dim(0, Split(split.axes, split.owned[::-1]))

    with pytest.raises(LayoutError, match="tokens are sent as if the experts were"):
        changed("replicate", swap)


def test_a_rank_that_computes_anothers_experts_is_refused() -> None:
    def shift(program: Program) -> None:
        name = node_of(program, localise_experts).args[2].name
        entry = program.table[name]
        program.table[name] = type(entry)(entry.whole, entry.axes, entry.values[::-1])

    with pytest.raises(LayoutError, match=r"rank must be 0 at .*=0, got 1"):
        changed("replicate", shift)


def test_gates_of_all_experts_are_refused() -> None:
    def global_gates(program: Program) -> None:
        combine, local = node_of(program, expert_combine), node_of(program, localise_experts)
        combine.args = (*combine.args[:2], local.args[1])

    with pytest.raises(LayoutError, match="with the gates of no exchange"):
        changed("replicate", global_gates)


def test_a_way_back_that_is_missing_is_refused() -> None:
    def unreturned(program: Program) -> None:
        back = node_of(program, expert_return)
        back.replace_all_uses_with(back.args[0])
        program.graph.erase_node(back)

    with pytest.raises(LayoutError):
        changed("exchange", unreturned)


def test_rows_that_were_not_sent_are_refused() -> None:
    def unsent(program: Program) -> None:
        linear, send = node_of(program, grouped_linear), node_of(program, expert_send)
        dispatch = linear.args[0].args[0]
        dispatch.args = (send.args[0], *dispatch.args[1:])

    with pytest.raises(LayoutError):
        changed("exchange", unsent)


def test_gates_that_are_not_masked_give_other_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is proven by layouts matters: the same program with everybody's gates is wrong."""
    model, traced = small("gpt_oss")
    parts = compile_program(traced, plan("ep=2", exchange="replicate"))
    for node in parts.program.graph.nodes:
        if node.target is localise_experts:
            node.args = (node.args[0], node.args[1], 0)
    assert any(isinstance(node.args[2], int) for node in parts.program.graph.nodes if node.target is localise_experts)
    assert not any(
        isinstance(arg, PerRankInt) for n in parts.program.graph.nodes if n.target is localise_experts for arg in n.args
    )
    ids = torch.arange(3, 13, device="cpu")[None]
    expected = reference.forward(model, lifted=True, input_ids=ids)
    assert difference(parts.simulate(input_ids=ids), expected) > 1e-3
