"""Rows are collected where they are needed: a hand-made program whose tokens ranks deal out, and what is refused."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import fx

from partitioner.compile.insert_collectives import Rewriter
from partitioner.compile.parts import Parts
from partitioner.errors import LayoutError
from partitioner.program.program import Program, Value
from partitioner.proof.layouts import check
from partitioner.sharding.layout import REPLICATED, Layout, Rows
from partitioner.sharding.mesh import Mesh
from passes.context_parallel import ContextParallel
from runtime.ops.rows import collect_rows, take_rows
from tests.support import handmade

aten = torch.ops.aten


def dealt(ranks: int = 3) -> Program:
    """With a rank's own tokens from the inputs to the logits."""
    return ContextParallel(attention="ring").run(handmade.plain().copy(Mesh.of(sp=ranks)))


def named(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if node.name == name)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
def test_rows_of_three_ranks_equal_the_whole(length: int) -> None:
    """Uneven, and with ranks that have none."""
    program, ids = dealt(), handmade.input_ids(2, length)
    check(program)
    assert [node.target for node in program.graph.nodes].count(collect_rows) == 1
    expected = Parts(handmade.plain(), None).simulate(input_ids=ids)
    torch.testing.assert_close(Parts(program, None).simulate(input_ids=ids), expected, rtol=1e-12, atol=1e-12)


def own_size(program: Program, before: fx.Node) -> fx.Node:
    """How many tokens a rank has of its own."""
    rows = next(node for node in program.graph.nodes if node.target is take_rows)
    with program.graph.inserting_before(before):
        own = program.graph.call_function(aten.sym_size.int, (rows, 1))
    own.meta = {"val": program.symbols["sequence"]}
    return own


def test_a_total_of_one_ranks_rows_is_refused() -> None:
    program = dealt()
    collect = next(node for node in program.graph.nodes if node.target is collect_rows)
    collect.args = (collect.args[0], own_size(program, collect), collect.args[2])
    with pytest.raises(LayoutError, match=r"collects sequence rows of all ranks together, but its total"):
        check(program)


def test_the_size_of_one_ranks_rows_is_refused_for_what_has_all() -> None:
    """A view of the whole with as many tokens as a rank has of its own."""
    program = dealt()
    output = program.graph.output_node()
    (logits,) = output.all_input_nodes
    own = own_size(program, output)
    with program.graph.inserting_before(output):
        viewed = program.graph.call_function(aten.reshape.default, (logits, [-1, own, handmade.VOCABULARY]))
    viewed.meta = {"val": logits.meta["val"], "path": "model"}
    output.replace_input_with(logits, viewed)
    with pytest.raises(
        LayoutError, match=r"takes a size from 'take_rows.*', of which each rank has sequence rows of sp"
    ):
        check(program)


def test_a_number_of_rows_that_no_input_tells_is_refused() -> None:
    program = handmade.plain().copy(Mesh.of(sp=2))
    node, user = named(program, "hidden"), named(program, "up")
    value = node.meta["val"]
    node.meta = {**node.meta, "val": Value((value.shape[0], sympy.Symbol("elsewhere"), value.shape[2]), value.dtype)}
    rewriter = Rewriter(program, {node: Layout((None, Rows(("sp",), "routed"), None))})
    with pytest.raises(LayoutError, match="hidden: how many rows all ranks have together, elsewhere, is no size of an"):
        rewriter.provide(user, node, REPLICATED(3))
