"""Products of single ops, by notation, are those that torch counts when the op runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from partitioner.analysis.cost.node_cost import NodeCost, node_costs
from partitioner.program.program import Program, Value
from partitioner.sharding.mesh import Mesh
from runtime.ops.experts import grouped_linear
from tests.support.handmade import BATCH, SEQUENCE

aten = torch.ops.aten
SIZES = {"batch": 2, "sequence": 5}
FLOAT = torch.float64
Call = tuple[Callable[..., Any], tuple[tuple[Any, ...], ...], Callable[..., tuple[Any, ...]], tuple[Any, ...]]
"""The op, the shapes of its tensors, its arguments from these, the shape of its result."""

COUNTED: dict[str, Call] = {
    "linear": (aten.linear.default, ((BATCH, SEQUENCE, 6), (4, 6), (4,)), lambda *t: t, (BATCH, SEQUENCE, 4)),
    "mm": (aten.mm.default, ((SEQUENCE, 6), (6, 4)), lambda *t: t, (SEQUENCE, 4)),
    "one row": (aten.matmul.default, ((1, 6), (6, 4)), lambda *t: t, (1, 4)),
    "bmm": (aten.bmm.default, ((BATCH, SEQUENCE, 6), (BATCH, 6, 3)), lambda *t: t, (BATCH, SEQUENCE, 3)),
    "broadcast": (
        aten.matmul.default, ((BATCH, 3, SEQUENCE, 6), (1, 3, 6, 4)), lambda *t: t, (BATCH, 3, SEQUENCE, 4),
    ),
    "addmm": (aten.addmm.default, ((4,), (SEQUENCE, 6), (6, 4)), lambda *t: t, (SEQUENCE, 4)),
    "baddbmm": (
        aten.baddbmm.default, ((BATCH, SEQUENCE, 3), (BATCH, SEQUENCE, 6), (BATCH, 6, 3)), lambda *t: t,
        (BATCH, SEQUENCE, 3),
    ),
    "einsum": (
        aten.einsum.default, ((BATCH, SEQUENCE, 6), (6, 3, 4)), lambda *t: ("bsk,khd->bhsd", list(t)),
        (BATCH, 3, SEQUENCE, 4),
    ),
    "convolution": (
        aten.conv1d.default, ((BATCH, 6, SEQUENCE), (4, 6, 3), (4,)), lambda *t: (*t, [1], [2]),
        (BATCH, 4, SEQUENCE + 2),
    ),
    "depthwise": (
        aten.conv1d.default, ((BATCH, 6, SEQUENCE), (6, 1, 3)), lambda *t: (*t, None, [1], [2], [1], 6),
        (BATCH, 6, SEQUENCE + 2),
    ),
    "no product": (aten.mul.Tensor, ((BATCH, SEQUENCE, 6), (6,)), lambda *t: t, (BATCH, SEQUENCE, 6)),
    "sum": (aten.sum.dim_IntList, ((BATCH, SEQUENCE, 6),), lambda *t: (*t, [-1]), (BATCH, SEQUENCE)),
    "softmax": (aten.softmax.int, ((BATCH, SEQUENCE, 6),), lambda *t: (*t, -1), (BATCH, SEQUENCE, 6)),
}  # fmt: skip


def program_of(call: Call) -> tuple[Program, list[torch.Tensor]]:
    """One op on placeholders, and tensors for these."""
    target, shapes, arguments, shape = call
    program = Program(fx.Graph(), (), {}, {}, {"batch": BATCH, "sequence": SEQUENCE}, Mesh.of())
    nodes, tensors = [], []
    for i, each in enumerate(shapes):
        node = program.graph.placeholder(f"x{i}")
        node.meta["val"] = Value(each, FLOAT)
        nodes.append(node)
        sizes = [int(size.subs({BATCH: 2, SEQUENCE: 5})) if not isinstance(size, int) else size for size in each]
        tensors.append(torch.zeros(sizes, dtype=FLOAT))
    node = program.graph.call_function(target, arguments(*nodes))
    node.meta["val"] = Value(shape, FLOAT)
    program.graph.output(node)
    return program, tensors


@pytest.mark.parametrize("name", COUNTED)
def test_products_are_those_that_torch_counts(name: str) -> None:
    program, tensors = program_of(COUNTED[name])
    (cost,) = node_costs(program, {}, SIZES)
    target, _, arguments, _ = COUNTED[name]
    with FlopCounterMode(display=False) as counter:
        result = target(*arguments(*tensors))
    assert cost.flops == counter.get_total_flops()
    assert (cost.flops > 0) == (name not in ("no product", "sum", "softmax"))
    assert (cost.bytes_read, cost.bytes_written) == (sum(t.nbytes for t in tensors), result.nbytes)
    assert not cost.unsure


def grouped(rows: int, experts: int) -> NodeCost:
    shapes = ((rows, 6), (experts, 4, 6), (experts,))
    program, _ = program_of((grouped_linear, shapes, lambda *t: t, (rows, 4)))
    (cost,) = node_costs(program, {}, SIZES)
    return cost


def test_an_expert_more_is_no_work_more() -> None:
    assert grouped(10, 3).flops == grouped(10, 9).flops == 2 * 10 * 6 * 4
    assert grouped(20, 3).flops == 2 * grouped(10, 3).flops
    weights = [grouped(10, experts).bytes_read - (10 * 6 + experts) * 8 for experts in (3, 9, 40)]
    assert weights == [experts * 6 * 4 * 8 for experts in (3, 9, 10)]  # ten rows meet ten experts at most
