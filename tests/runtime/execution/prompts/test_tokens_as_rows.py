"""Graphs for one token that run several: against the same graph run for one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from runtime.execution.prompts.token_loops import loops_of
from runtime.execution.prompts.tokens_as_rows import tokens_as_rows
from runtime.ops.state import state_read, state_write

WIDTH = 4


def graph() -> fx.Graph:
    """y = h + p, of h' = h / 2 + x, and of p, the x of the token before; x from a table."""
    made = fx.Graph()
    ids, active, last = (made.placeholder(name) for name in ("input_ids", "active", "last"))
    table = made.get_attr("table")
    x = made.call_function(nn.functional.embedding, (ids, table))
    row = made.call_function(torch.select, (x, 1, 0))
    read = {
        name: made.call_function(state_read, (ids,), {"state": name, "shape": [WIDTH], "dtype": torch.float64})
        for name in ("h", "p")
    }
    half = made.call_function(torch.mul, (read["h"], 0.5))
    h = made.call_function(torch.add, (half, row))
    made.call_function(state_write, (h, active), {"state": "h"})
    made.call_function(state_write, (row, active), {"state": "p"})
    y = made.call_function(torch.add, (h, read["p"]))
    made.output(made.call_function(torch.unsqueeze, (y, 1)))
    assert last.op == "placeholder"
    return made


def bound(source: fx.Graph, states: dict[str, Tensor]) -> fx.GraphModule:
    """With states that are read and written in a dict."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(source, {}))
    for node in copy.nodes:
        if node.target is state_read:
            node.target, node.kwargs = (lambda ids, *, name: states[name]), {"name": node.kwargs["state"]}
        elif node.target is state_write:

            def write(value: Tensor, active: Tensor, *, name: str) -> None:
                states[name] = torch.where(active[:, None], value, states[name])

            node.target, node.kwargs = write, {"name": node.kwargs["state"]}
    table = torch.arange(40.0, dtype=torch.float64).reshape(10, WIDTH).sin()
    return fx.GraphModule({"table": table}, copy)


def zeros(rows: int) -> dict[str, Tensor]:
    return {name: torch.zeros(rows, WIDTH, dtype=torch.float64) for name in ("h", "p")}


def test_only_what_waits_for_the_token_before_is_a_loop() -> None:
    (loop,) = loops_of(graph())
    assert not isinstance(loop, str)
    assert [node.kwargs["state"] for node in loop.reads] == ["h"]
    assert [node.target for node in loop.body] == [torch.mul, torch.add]


def test_several_tokens_leave_what_one_after_the_other_leaves() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5], [3, 3, 3, 3, 3]])
    active = torch.tensor([True, True, False])
    last = torch.tensor([4, 4, 4])
    by_one, at_once = zeros(3), zeros(3)
    single = bound(graph(), by_one)
    for position in range(5):
        said = single(ids[:, position : position + 1], active, last)
    several = bound(tokens_as_rows(graph()), at_once)
    for piece in (ids[:, :2], ids[:, 2:]):
        found = several(piece, active, torch.full((3,), piece.shape[1] - 1))
    assert torch.equal(found[:2], said[:2])
    assert all(torch.equal(by_one[name], at_once[name]) for name in by_one)
    assert not at_once["h"][2].any()  # a row that takes no tokens keeps what it has


def test_whole_texts_yield_every_token_and_keep_nothing() -> None:
    ids, active, last = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, dtype=torch.bool), torch.zeros(2).long()
    states = zeros(2)
    single = bound(graph(), states)
    said = torch.cat([single(ids[:, i : i + 1], active, last) for i in range(3)], dim=1)
    whole = tokens_as_rows(graph(), whole={"h": [WIDTH], "p": [WIDTH]})
    assert not any(node.target in (state_read, state_write) for node in whole.nodes)
    assert torch.equal(bound(whole, {})(ids, active, last), said)


def test_a_state_that_is_written_twice_is_refused() -> None:
    source = graph()
    write = next(node for node in source.nodes if node.target is state_write)
    with source.inserting_after(write):
        source.call_function(state_write, write.args, dict(write.kwargs))
    assert loops_of(source) == "the state 'h' is written more than once"
