"""Where the sequences of a merged dim begin is told from how it was merged, or not at all."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import fx

from partitioner.analysis.layouts.merged_rows import sequences_in_order
from partitioner.program.program import Value

aten = torch.ops.aten
BATCH, SEQUENCE = (
    sympy.Symbol("batch", positive=True, integer=True),
    sympy.Symbol("sequence", positive=True, integer=True),
)


def made(graph: fx.Graph, target: object, args: tuple[object, ...], *shape: object) -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta = {"val": Value(shape, torch.float32)}
    return node


def given(graph: fx.Graph, *shape: object) -> fx.Node:
    node = graph.placeholder("x")
    node.meta = {"val": Value(shape, torch.float32)}
    return node


@pytest.mark.parametrize(
    ("shape", "merged", "dim", "in_order"),
    [
        ((BATCH, SEQUENCE, 8), (BATCH * SEQUENCE, 8), 0, True),
        ((SEQUENCE, BATCH, 8), (BATCH * SEQUENCE, 8), 0, False),  # tokens of all sequences, one after the other
        ((BATCH, 4, SEQUENCE, 2), (4 * BATCH * SEQUENCE, 2), 0, True),
        ((BATCH, 4, SEQUENCE, 2), (BATCH, 4 * SEQUENCE, 2), 1, True),
        ((BATCH, SEQUENCE, 4, 2), (BATCH, 4 * SEQUENCE, 2), 1, False),  # heads within tokens
    ],
)
def test_how_a_dim_was_merged(shape: tuple[object, ...], merged: tuple[object, ...], dim: int, in_order: bool) -> None:
    graph = fx.Graph()
    flat = made(graph, aten.reshape.default, (given(graph, *shape), [-1]), *merged)
    after = made(graph, aten.relu.default, (flat,), *merged)  # what is made of it row by row has the same rows
    assert sequences_in_order(after, dim, SEQUENCE) is in_order


def test_what_was_given_merged_tells_nothing() -> None:
    graph = fx.Graph()
    assert not sequences_in_order(given(graph, BATCH * SEQUENCE, 8), 0, SEQUENCE)
