"""The overlap pass: exchanges of experts are under way while shared experts run, and nothing else changes."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner import Plan
from partitioner.compile.partition import compile_program
from partitioner.errors import LayoutError, SamplingError
from partitioner.program.program import Program
from partitioner.proof.layouts import check
from partitioner.proof.meetings import events_of
from passes.overlap import Overlap
from runtime.communication.channels import Channel, Handle
from runtime.ops.collectives import landed
from runtime.ops.expert_exchange import expert_return, expert_send, receive_from_experts, send_to_experts
from runtime.ops.rows import collect_rows, scatter_rows
from runtime.processes.launch import launch
from tests.support import generated
from tests.support.partitioned import EXACT, compiled_for, error, traced

PLAN = "ep=2,expert-parallel.exchange=exchange"
GATHER = "ep=2,expert-parallel.exchange=gather"


@functools.cache
def parts(name: str, plan: str = PLAN) -> Any:
    return compiled_for(name, plan)


def names(program: Program) -> list[str]:
    """Of the ops, from the first exchange to the sum behind it."""
    found = [
        str(n.target.__name__).partition(".")[0]  # type: ignore[union-attr]
        for n in program.graph.nodes
        if n.op == "call_function"
    ]
    start = found.index("expert_send")
    return found[start : found.index("add", start) + 1]


def operations(program: Program) -> Counter[str]:
    return Counter(str(n.target.__name__) for n in program.graph.nodes if n.op == "call_function")  # type: ignore[union-attr]


def test_half_of_the_shared_experts_on_the_way_there_and_half_on_the_way_back() -> None:
    program = parts("deepseek_v3").program
    found = names(program)
    there, back = found.index("landed"), found.index("expert_return")
    assert found[:there].count("linear") == 2
    assert found[there : there + 4] == ["landed"] * 3 + ["expert_dispatch"]
    assert found[back:].count("linear") == 1
    assert found.index("landed", back) > found.index("linear", back)
    assert any("1 layers are under way while 8 ops" in note for note in program.notes)
    # 64 numbers of float64, two choices of an expert and its gate
    assert any("536 bytes there and 512 back" in note for note in program.notes)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("deepseek_v3", PLAN),
        pytest.param("qwen2_moe", PLAN, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "tp=2,ep=4,expert-parallel.exchange=exchange", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "tp=2,ep=4,expert-parallel.exchange=exchange", marks=pytest.mark.slow),
    ],
)
def test_values_and_meetings_are_as_they_were(name: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(name, parts(name, plan), 6) < EXACT
    with monkeypatch.context() as patch:
        patch.setattr(Overlap, "run", lambda self, program: program)
        before = compile_program(traced(name)[1], Plan.parse(plan)).program
    after = parts(name, plan).program
    assert not any(node.target is landed for node in before.graph.nodes)
    assert operations(after) - operations(before) == Counter(landed=operations(after)["landed"])
    assert not operations(before) - operations(after)

    def met(program: Program) -> list[Any]:
        return [(event.node, event.meeting) for event in events_of(program.graph)]

    exchanges = [event for event in met(after) if event[0].startswith("expert")]
    assert exchanges == [event for event in met(before) if event[0].startswith("expert")]
    assert sorted(map(str, met(after))) == sorted(map(str, met(before)))


@pytest.mark.parametrize(
    ("name", "plan"), [("mixtral", PLAN), ("deepseek_v3", "ep=2,expert-parallel.exchange=replicate")]
)
def test_nothing_changes_where_nothing_stands_beside_an_exchange(name: str, plan: str) -> None:
    program = parts(name, plan).program
    assert not any(node.target is landed for node in program.graph.nodes)
    assert not any("under way" in note for note in program.notes)


def test_generation() -> None:
    assert generated.error("deepseek_v3", parts("deepseek_v3"), generated.prompts("deepseek_v3", (1, 6)), new=3) < 1e-9


def late(monkeypatch: pytest.MonkeyPatch, *, comes: bool = True) -> None:
    """What is gathered and scattered stands in its place when it is waited for; before, there are no numbers."""

    def begun(run: Any) -> Any:
        def begin(channel: Channel, x: Tensor, dim: int, sizes: Any = None) -> Handle:
            found = run(channel, x, dim, sizes)
            into = torch.full_like(found, torch.nan)
            return Handle(lambda: into.copy_(found) if comes else into, into=into)

        return begin

    monkeypatch.setattr(Channel, "all_gather_begin", begun(lambda channel, *given: channel.all_gather(*given)))
    monkeypatch.setattr(Channel, "reduce_scatter_begin", begun(lambda channel, *given: channel.reduce_scatter(*given)))


def test_what_is_gathered_is_under_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = parts("deepseek_v3", GATHER)
    program = found.program_of("prefill")
    named = [str(n.target.__name__) for n in program.graph.nodes if n.op == "call_function"]  # type: ignore[union-attr]
    there = len(named) - 1 - named[::-1].index("collect_rows")
    between = named[there + 1 : named.index("landed")]
    assert between.count("linear.default") == 2, "half of the shared experts"
    back = named.index("scatter_rows")
    assert named[back : named.index("landed", back)].count("linear.default") == 1
    assert any("1 layers are under way while 8 ops" in note for note in program.notes)
    assert not any(node.target is landed for node in found.program_of("decode").graph.nodes)
    late(monkeypatch)
    assert generated.error("deepseek_v3", found, generated.prompts("deepseek_v3", (1, 6)), new=2) < 1e-9
    late(monkeypatch, comes=False)  # the negative control
    with pytest.raises(SamplingError, match="largest logit is nan"):
        generated.error("deepseek_v3", found, generated.prompts("deepseek_v3", (1, 6)), new=2)


@pytest.mark.parametrize("op", [collect_rows, scatter_rows])
def test_what_is_gathered_is_not_read_before(op: Any) -> None:
    program = parts("deepseek_v3", GATHER).program_of("prefill").copy()
    check(program)
    node = next(node for node in program.graph.nodes if node.target is op and node.kwargs.get("ahead"))
    (waits,) = [user for user in node.users if user.target is landed]
    waits.replace_all_uses_with(node)
    program.graph.erase_node(waits)
    with pytest.raises(LayoutError, match="has sent ahead: it must have landed"):
        check(program)


@pytest.mark.parametrize("op", [expert_send, expert_return])
def test_what_has_not_landed_is_not_read(op: Any) -> None:
    program = parts("deepseek_v3").program.copy()
    check(program)
    node = next(node for node in program.graph.nodes if node.target is op)
    given = node if op is expert_return else next(user for user in node.users if user.args[1] == 0)
    (waits,) = [user for user in given.users if user.target is landed]
    waits.replace_all_uses_with(given)
    program.graph.erase_node(waits)
    with pytest.raises(LayoutError, match="has sent ahead: it must have landed"):
        check(program)


class Late(Channel):
    """A group of one rank whose messages arrive when they are waited for."""

    def __init__(self) -> None:
        super().__init__(("ep",), (0,), 0, node="late")
        self.log: list[str] = []

    def prepare(self, kind: Any, *, overwrite: bool = False, **options: Any) -> Any:
        return lambda x, *counts: x

    def all_to_all_begin(self, x: Tensor, *counts: Any, sizes_from: str | None = None) -> Handle:
        def arrive() -> Tensor:
            self.log.append("arrived")
            return x

        self.log.append("begun")
        return Handle(arrive)


def test_tensors_are_filled_when_they_land() -> None:
    channel = Late()
    hidden, index = torch.rand(5, 3, dtype=torch.float64), torch.tensor([[0], [1], [0], [1], [1]])
    gates = torch.rand(5, 1, dtype=torch.float64)
    rows, local, weights, back = send_to_experts(channel, hidden, index, gates, experts=[0, 1], counts=[2], ahead=True)
    assert channel.log == ["begun"]
    assert torch.equal(landed(local), index)
    assert torch.equal(landed(rows), hidden)
    assert torch.equal(landed(weights), gates)
    assert channel.log == ["begun", "arrived"], "once for all three"
    found = receive_from_experts(channel, rows, back, ahead=True)
    assert not found.any()
    assert torch.equal(landed(found), hidden)
    assert torch.equal(landed(found), hidden), "added once"


@pytest.mark.processes
@pytest.mark.slow
def test_over_gloo_what_stands_beside_runs_meanwhile(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.equivalence.ranks.overlap_rank"], num_ranks=2, timeout_s=300)
