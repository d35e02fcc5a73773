"""The ops of shared-out tokens in graphs: what a node says that it exchanges is what it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from partitioner.errors import InputError
from partitioner.sharding.mesh import Mesh
from runtime.engine.simulator import Simulator
from runtime.ops.attention import attention
from runtime.ops.communicating import COMMUNICATING, Meeting, named_axes, read_call
from runtime.ops.rows.sequence_attention import cached_sequence_attention, sequence_attention
from runtime.ops.rows.share_rows import collect_rows, take_rows
from runtime.program.rank_program import RankProgram, RunInput
from tests.runtime.ops.rows.sp_cases import tensors

PARTS = 3
MEETINGS = {
    "ring": ["permute"] * (PARTS - 1),
    "gather": ["all_gather"],
    "ulysses": ["all_to_all"] * 2,
    "ring-ulysses": ["all_to_all", *["permute"] * (PARTS - 1), "all_to_all"],
}


def graph_of(rank: int, how: str) -> fx.Graph:
    """q, k and v whole on every rank, as inputs of a graph are, and so the result."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in "qkv"]
    total = graph.call_function(torch.ops.aten.sym_size.int, (inputs[0], 2))
    shared: dict[str, Any] = {"parts": PARTS, "order": "zigzag"}
    own = [
        graph.call_function(take_rows, (x, rank), {**shared, "axes": ("sp",), "dim": 2, "kind": "sequence"})
        for x in inputs
    ]
    options = {**shared, "how": how, "scale": 0.4, "causal": True}
    out = graph.call_function(sequence_attention, (*own, total, None, None, "sp"), options)
    graph.output(graph.call_function(collect_rows, (out, total, "sp"), {"dim": 2, "order": "zigzag"}))
    return graph


def ranks(how: str) -> list[RankProgram]:
    mesh = Mesh.of(sp=PARTS)
    inputs = tuple(RunInput(name, torch.float64, (2, 4, 13, 6), "required") for name in "qkv")
    return [
        RankProgram(lambda rank=rank: graph_of(rank, how), mesh, mesh.coordinates(rank), (), inputs)  # type: ignore[misc]
        for rank in range(PARTS)
    ]


@pytest.mark.parametrize("how", MEETINGS)
def test_a_simulator_runs_them_and_a_profile_shows_what_was_declared(how: str) -> None:
    q, k, v = tensors(2, 13, kv=4)
    simulator = Simulator(ranks(how))
    with simulator.profile() as trace:
        found = simulator(q=q, k=k, v=v)
    for each in found:
        torch.testing.assert_close(each, attention(q, k, v, scale=0.4, causal=True), rtol=1e-12, atol=1e-12)
    events = [event for event in trace.events() if event["ph"] == "X" and event["name"] == "sequence_attention"]
    numbers = [len(event["args"].get("meetings", [0])) for event in events if event["tid"] == 2]
    assert numbers == [len(MEETINGS[how])] * PARTS


def declared(how: str, op: Any = sequence_attention) -> tuple[Meeting, ...]:
    graph = fx.Graph()
    q, k, v, fourth = (graph.placeholder(name) for name in ("q", "k", "v", "fourth"))
    for node, width, heads in ((q, 6, 4), (k, 6, 2), (v, 4, 2)):
        node.meta["val"] = torch.empty(2, heads, 5, width, dtype=torch.bfloat16, device="meta")
    options = {"how": how, "parts": PARTS, "scale": 1.0, **({} if op is sequence_attention else {"state": "s"})}
    node = graph.call_function(op, (q, k, v, fourth, None, None, "sp"), options)
    graph.output(node)
    assert named_axes([graph]) == (("sp",),)
    assert read_call(node).operands == (q, k, v, fourth, None, None)
    return COMMUNICATING[op].meetings(node)


def test_what_is_declared() -> None:
    for how, kinds in MEETINGS.items():
        assert [meeting.kind for meeting in declared(how)] == kinds
    half, both = torch.bfloat16, (sequence_attention, cached_sequence_attention)
    for op in both:
        assert declared("ring", op) == (Meeting("permute", ("sp",), (2, 2, 5, 10), half),) * 2
        assert declared("gather", op) == (Meeting("all_gather", ("sp",), (2, 2, 5, 10), half),)
        there, back = 2 * 5 * (4 * 6 + 3 * 10), 2 * 5 * 4 * 4  # two of three ranks read the first kv head
        assert declared("ulysses", op) == tuple(Meeting("all_to_all", ("sp",), (n,), half) for n in (there, back))
    merged = Meeting("all_gather", ("sp",), (1, 2, 4, 5, 5), torch.float32)
    assert declared("merge", cached_sequence_attention) == (merged,)


def test_without_a_cache_it_says_so() -> None:
    operands = (None,) * 6
    with pytest.raises(InputError, match="cached_sequence_attention of 's' is not bound to a cache"):
        cached_sequence_attention(*operands, "sp", how="ring", parts=2, state="s", scale=1.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cached_sequence_attention of 's' is not bound to a cache"):
        COMMUNICATING[cached_sequence_attention].run(None, *operands, how="ring", parts=2, state="s", scale=1.0)
