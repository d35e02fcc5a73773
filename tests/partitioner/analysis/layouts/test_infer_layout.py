"""Layouts of single ops: what comes out, and what each operand must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from partitioner.analysis.layouts.infer_layout import Inference, disjoint, infer_compute
from partitioner.analysis.layouts.infer_move import infer_move
from partitioner.errors import LayoutError
from partitioner.program.program import Program, Value
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Split
from partitioner.sharding.mesh import Mesh

aten = torch.ops.aten


def halves(size: int) -> Split:
    return Split(("tp",), (IndexSet.range(0, size // 2), IndexSet.range(size // 2, size)))


def infer(op: Any, operands: list[tuple[tuple[int, ...], Layout]], out: tuple[int, ...], *rest: Any) -> Inference:
    graph = fx.Graph()
    layouts = {}
    nodes = []
    for i, (shape, layout) in enumerate(operands):
        node = graph.placeholder(f"x{i}")
        node.meta["val"] = Value(shape, torch.float64)
        layouts[node] = layout
        nodes.append(node)
    made = graph.call_function(op, (*nodes, *rest))
    made.meta["val"] = Value(out, torch.float64)
    program = Program(graph, (), {}, {}, {}, Mesh.of(tp=2))
    if op in (aten.reshape.default, aten.transpose.int):
        return infer_move(program, made, layouts)
    return infer_compute(program, made, layouts)


def test_column_parallel() -> None:
    found = infer(aten.linear.default, [((1, 5, 8), REPLICATED(3)), ((6, 8), Layout((halves(6), None)))], (1, 5, 6))
    assert found.outputs == (Layout((None, None, halves(6))),)


def test_row_parallel_leaves_a_partial_sum() -> None:
    split = Layout((None, None, halves(8)))
    found = infer(aten.linear.default, [((1, 5, 8), split), ((6, 8), Layout((None, halves(8))))], (1, 5, 6))
    assert found.outputs == (Layout((None, None, None), frozenset({"tp"})),)
    assert [layout for _, layout in found.requires] == [split, Layout((None, halves(8)))]


def test_bias_must_count_once() -> None:
    operands = [
        ((1, 5, 8), Layout((None, None, halves(8)))),
        ((6, 8), Layout((None, halves(8)))),
        ((6,), REPLICATED(1)),
    ]
    found = infer(aten.linear.default, operands, (1, 5, 6))
    assert found.requires[2][1] == Layout((None,), frozenset({"tp"}))


def test_rows_and_columns_over_one_axis_are_not_a_product() -> None:
    """Rank r would hold block (r, r) only, and sum rows that other ranks do not have."""
    operands = [((1, 5, 8), Layout((None, None, halves(8)))), ((6, 8), Layout((halves(6), None)))]
    found = infer(aten.linear.default, operands, (1, 5, 6))
    assert found.outputs == (Layout((None, None, halves(6))),)
    assert found.requires[0][1] == REPLICATED(3)
    with pytest.raises(LayoutError, match="both split and a partial sum"):
        Layout((halves(6),), frozenset({"tp"}))


def test_a_norm_needs_the_whole_row() -> None:
    found = infer(aten.softmax.int, [((2, 8), Layout((None, halves(8))))], (2, 8), -1)
    assert found.requires[0][1] == REPLICATED(2)


def test_a_nonlinear_op_needs_the_complete_sum() -> None:
    found = infer(aten.silu.default, [((2, 8), Layout((None, None), frozenset({"tp"})))], (2, 8))
    assert found.requires[0][1] == REPLICATED(2)
    assert found.outputs == (REPLICATED(2),)


def test_heads_stay_whole_through_a_reshape_and_half_heads_are_refused() -> None:
    found = infer(aten.reshape.default, [((2, 8), Layout((None, halves(8))))], (2, 4, 2), [2, 4, 2])
    assert found.outputs == (Layout((None, halves(4), None)),)
    uneven = Split(("tp",), (IndexSet.range(0, 3), IndexSet.range(3, 8)))
    assert infer(aten.reshape.default, [((2, 8), Layout((None, uneven)))], (2, 4, 2), [2, 4, 2]).problem


@pytest.mark.parametrize(
    ("op", "out", "fits"), [(aten.stack.default, (3, 2, 8), False), (aten.cat.default, (6, 8), True)]
)
def test_operands_that_one_rank_has_and_another_has_not(op: Any, out: tuple[int, ...], fits: bool) -> None:
    """Those can be put behind each other, where a rank's piece is empty; to stack them, all need one shape."""
    everything, nothing = IndexSet.range(0, 2), IndexSet.range(0, 0)
    first, second = (
        Layout((Split(("tp",), pieces), None)) for pieces in ((everything, nothing), (nothing, everything))
    )
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(3)]
    layouts = dict(zip(nodes, (first, first, second), strict=True))
    for node in nodes:
        node.meta["val"] = Value((2, 8), torch.float64)
    made = graph.call_function(op, (nodes, 0))
    made.meta["val"] = Value(out, torch.float64)
    found = infer_move(Program(graph, (), {}, {}, {}, Mesh.of(tp=2)), made, layouts)
    if fits:
        assert [piece.size for piece in found.outputs[0].split(0).owned] == [4, 2]  # type: ignore[union-attr]
    else:
        assert not found.outputs
        assert "stack takes operands of one shape" in (found.problem or "")


def test_what_several_ranks_hold_counts_on_the_first() -> None:
    shared = Split(("tp",), (IndexSet.range(0, 4), IndexSet.range(2, 6)))
    assert disjoint(shared).owned == (IndexSet.range(0, 4), IndexSet.range(4, 6))
