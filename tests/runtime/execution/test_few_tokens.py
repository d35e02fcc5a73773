"""Steps of single tokens: what is made of positions comes from a table, and only last tokens are normalised."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from runtime.execution.fusion.few_tokens import PositionTable, for_single_tokens
from runtime.execution.fusion.operations import added_norm
from runtime.generation import steps
from runtime.ops.cached_attention import last_token
from tests.runtime.execution.captured_executable import Captured
from tests.support.generated import prompts
from tests.support.partitioned import compiled

CPU = torch.device("cpu")


def rotary(mix: Any = None) -> fx.Graph:
    """Sine and cosine of positions times frequencies, as bound graphs have them. mix: what else is done with them."""
    graph = fx.Graph()
    frequencies, position_ids = graph.placeholder("weight_0"), graph.placeholder("position_ids")
    wide = graph.call_method("to", (graph.call_function(torch.unsqueeze, (position_ids, 2)), torch.float64))
    angles = graph.call_function(torch.mul, (wide, graph.call_method("to", (frequencies, torch.float64))))
    if mix is not None:
        angles = graph.call_function(mix, (angles,))
    both = graph.call_function(torch.cat, ([angles, angles], -1))
    cos = graph.call_function(torch.unsqueeze, (graph.call_function(torch.cos, (both,)), 1))
    sin = graph.call_function(torch.mul, (graph.call_function(torch.sin, (both,)), 0.5))
    graph.output((cos, graph.call_function(torch.narrow, (sin, -1, 0, 3))))
    return graph


def tables(graph: fx.Graph) -> list[PositionTable]:
    return [node.target for node in graph.nodes if isinstance(node.target, PositionTable)]


def run(graph: fx.Graph, *given: Tensor) -> Any:
    return fx.GraphModule({}, graph).forward(*given)


def test_a_table_says_what_the_ops_say() -> None:
    graph, frequencies = rotary(), torch.rand(1, 1, 4)
    room = [10]
    made = for_single_tokens(graph, 1, lambda: room[0])
    assert len(tables(made)) == 1
    assert not any(node.target is torch.cos for node in made.nodes)
    for positions in ([[3]], [[0], [9], [5]], [[2, 3, 4]]):  # of several tokens, the ops themselves
        at = torch.tensor(positions)
        for found, wanted in zip(run(made, frequencies, at), run(graph, frequencies, at), strict=True):
            assert torch.equal(found, wanted)
            assert found.stride(-1) == 1
    (table,) = tables(made)
    assert [len(each) for each in table._tables] == [16]
    room[0] = 33  # another cache
    at = torch.tensor([[32], [40]])
    assert all(torch.equal(*each) for each in zip(run(made, frequencies, at), run(graph, frequencies, at), strict=True))
    assert [len(each) for each in table._tables] == [16, 64]


def test_another_table_is_noticed() -> None:
    """The negative control."""
    graph, at = rotary(), torch.tensor([[3]])
    made = for_single_tokens(graph, 1, lambda: 10)
    run(made, torch.rand(1, 1, 4), at)
    frequencies = torch.rand(1, 1, 4)
    assert not torch.equal(run(made, frequencies, at)[0], run(graph, frequencies, at)[0])


def test_what_mixes_rows_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = rotary(lambda x: x + x.amax())
    made, at = for_single_tokens(graph, 1, lambda: 10), torch.tensor([[3], [7]])
    given = torch.rand(1, 1, 4), at
    assert all(torch.equal(*each) for each in zip(run(made, *given), run(graph, *given), strict=True))
    assert any(node.target is torch.cos for node in made.nodes)
    # weights that have rows themselves
    graph = rotary()
    made = for_single_tokens(graph, 1, lambda: 10)
    for given in ((torch.rand(2, 1, 4), at), (torch.rand(1, 2, 1, 4), at)):
        assert all(torch.equal(*each) for each in zip(run(made, *given), run(graph, *given), strict=True))
    assert not tables(made)[0]._tables
    # and a table that would be too large
    monkeypatch.setattr("runtime.execution.fusion.few_tokens.MOST_BYTES", 100)
    given = torch.rand(1, 1, 4), at
    assert all(torch.equal(*each) for each in zip(run(made, *given), run(graph, *given), strict=True))
    assert not tables(made)[0]._tables


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_only_last_tokens_are_normalised(adds: bool, packed: bool) -> None:
    graph = fx.Graph()
    weight, x, y, last = (graph.placeholder(name) for name in ("weight_0", "x", "y", "last"))
    if adds:
        both = graph.call_function(added_norm, (x, y, [6], weight, 1e-5), {"scales": True})
        graph.call_function(operator.getitem, (both, 0))
        normed = graph.call_function(operator.getitem, (both, 1))
    else:
        normed = graph.call_function(torch.rms_norm, (x, [6], weight, 1e-5))
    graph.output(graph.call_function(last_token, (normed, last)))
    made = for_single_tokens(graph, 1, None)
    calls = [node.target for node in made.nodes if node.op == "call_function"]
    assert calls.index(last_token) < calls.index(added_norm if adds else torch.rms_norm)
    for size in (1, 5):
        shape = (1, 10 * size, 6) if packed else (2, size, 6)
        given = torch.rand(6).double(), torch.randn(shape).double(), torch.randn(shape).double()
        of_last = torch.tensor([2, 7]) if packed else torch.tensor([0, size - 1])
        assert torch.equal(run(made, *given, of_last), run(graph, *given, of_last))


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_steps_say_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = compiled(name, 1)
    plain = parts.generate(prompts(name), max_new_tokens=5, eos_token_id=[], logprobs=True)
    monkeypatch.setattr(steps, "Executable", Captured)
    by_table = parts.generate(prompts(name), max_new_tokens=5, eos_token_id=[], logprobs=True)
    assert torch.equal(plain.sequences, by_table.sequences)
    assert (plain.logprobs - by_table.logprobs).abs().max() < 1e-9
