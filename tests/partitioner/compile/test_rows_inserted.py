"""Rows are taken and collected where they are needed: a hand-made program whose hidden state ranks deal out."""

from __future__ import annotations

from collections import Counter

import pytest
import sympy
import torch
from torch import fx

from partitioner.analysis.layouts.propagate_layouts import place
from partitioner.compile.insert_collectives import Rewriter
from partitioner.compile.parts import Parts
from partitioner.errors import LayoutError
from partitioner.program.program import Program, Value
from partitioner.proof.layouts import check
from partitioner.proof.rows import check_rows
from partitioner.sharding.layout import REPLICATED, Layout, Rows, Split
from partitioner.sharding.mesh import Mesh
from passes.tensor_parallel import _Rewriting
from runtime.ops.collectives import all_reduce
from runtime.ops.rows import collect_rows, take_rows
from tests.support import handmade

aten = torch.ops.aten


def original(*, mixing: bool = False) -> Program:
    """mixing: with a running sum over the tokens before the head, and the hidden state added once more after it."""
    program = handmade.plain()
    if mixing:
        residual, hidden = named(program, "residual"), named(program, "hidden")
        with program.graph.inserting_after(residual):
            summed = program.graph.call_function(aten.cumsum.default, (residual, 1))
        with program.graph.inserting_after(summed):
            again = program.graph.call_function(aten.add.Tensor, (summed, hidden))
        for node in (summed, again):
            node.meta = {"val": residual.meta["val"], "path": "model"}
        residual.replace_all_uses_with(again, delete_user_cb=lambda user: user not in (summed, again))
    return program


def named(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if node.name == name)


def dealt(program: Program, mesh: Mesh, dims: dict[str, dict[int, Rows]], *, split: bool = False) -> Program:
    """The nodes of `dims` with a rank's own rows along these dims. split: the MLP over tp besides."""
    program = program.copy(mesh)
    weights = {}
    if split:
        ffn = Split(("tp",), handmade.cut(handmade.FFN, mesh.size("tp")))
        weights = {"model.up.weight": Layout((ffn, None)), "model.down.weight": Layout((None, ffn))}
    rows = {}
    for name, by_dim in dims.items():
        node = named(program, name)
        rank = len(node.meta["val"].shape)
        rows[node] = Layout(tuple(by_dim.get(dim) for dim in range(rank)))
    placement = place(program, weights, rows=rows)
    program.weight_layouts.update({name: layout for name, layout in placement.weights.items() if layout.axes})
    _Rewriting(program, placement, "tp").run()
    check(program)
    return program


def count(program: Program) -> Counter[object]:
    return Counter(node.target for node in program.graph.nodes if node.target in (take_rows, collect_rows, all_reduce))


def require_equal(program: Program, plain: Program, batch: int, length: int) -> None:
    ids = handmade.input_ids(batch, length)
    expected = Parts(plain, None).simulate(input_ids=ids)
    found = Parts(program, None).simulate(input_ids=ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


TOKENS = Rows(("sp",), "sequence")
SEQUENCES = Rows(("dp",), "batch")


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
def test_rows_of_three_ranks_equal_the_whole(length: int) -> None:
    """Uneven, and with ranks that have none."""
    program = dealt(original(), Mesh.of(sp=3), {"hidden": {1: TOKENS}})
    check_rows(program)
    assert count(program) == {take_rows: 1, collect_rows: 1}  # at the hidden state, and of the logits
    require_equal(program, original(), 2, length)


@pytest.mark.parametrize("length", [1, 5])
def test_who_looks_at_all_tokens_gets_them(length: int) -> None:
    program = dealt(original(mixing=True), Mesh.of(sp=3), {"hidden": {1: TOKENS}})
    # collected before the running sum, taken again where its result meets the hidden state, collected as logits
    assert count(program) == {take_rows: 2, collect_rows: 2}
    require_equal(program, original(mixing=True), 2, length)
    with pytest.raises(LayoutError, match=r"cumsum at .* reads other tokens"):
        check_rows(program)


@pytest.mark.parametrize("length", [1, 4])
def test_rows_beside_a_split_over_another_axis(length: int) -> None:
    program = dealt(original(), Mesh.of(sp=3, tp=2), {"hidden": {1: TOKENS}}, split=True)
    assert count(program) == {take_rows: 1, collect_rows: 1, all_reduce: 1}
    check_rows(program)
    require_equal(program, original(), 2, length)


@pytest.mark.parametrize(("axes", "batch"), [(("dp",), 1), (("dp",), 4), (("dp", "sp"), 3)])
def test_sequences_are_dealt_out_as_well(axes: tuple[str, ...], batch: int) -> None:
    program = dealt(original(mixing=True), Mesh.of(dp=3, sp=2), {"input_ids": {0: Rows(axes, "batch")}})
    # the running sum works within a sequence; the positions have theirs taken where they are added
    assert count(program) == {take_rows: 2, collect_rows: 1}
    check_rows_of_sequences_only(program)
    require_equal(program, original(mixing=True), batch, 3)


def check_rows_of_sequences_only(program: Program) -> None:
    with pytest.raises(LayoutError, match="mix tokens"):
        check_rows(program)


def test_rows_change_hands_between_axes() -> None:
    mesh = Mesh.of(sp=2, tp=2)
    program = dealt(original(), mesh, {"hidden": {1: TOKENS}, "act": {1: Rows(("tp",), "sequence")}})
    assert count(program)[collect_rows] >= 2
    check_rows(program)
    require_equal(program, original(), 1, 3)


def test_both_dims_at_once() -> None:
    program = dealt(original(), Mesh.of(dp=2, sp=2), {"hidden": {0: SEQUENCES, 1: TOKENS}})
    assert count(program) == {take_rows: 2, collect_rows: 2}
    check_rows(program)
    require_equal(program, original(), 3, 5)


@pytest.mark.parametrize("length", [1, 4])
def test_tokens_of_all_sequences_in_one_dim(length: int) -> None:
    """Batch and sequence merged; how many tokens there are is a product of two sizes."""

    def flattened() -> Program:
        program = original()
        act = named(program, "act")
        batch, sequence, size = act.meta["val"].shape
        with program.graph.inserting_after(act):
            flat = program.graph.call_function(aten.reshape.default, (act, [-1, size]))
        with program.graph.inserting_after(flat):
            positive = program.graph.call_function(aten.relu.default, (flat,))
        with program.graph.inserting_after(positive):
            back = program.graph.call_function(aten.reshape.default, (positive, [2, -1, size]))
        for node in (flat, positive):
            node.meta = {"val": Value((batch * sequence, size), act.meta["val"].dtype), "path": "model"}
        back.meta = {"val": act.meta["val"], "path": "model"}
        act.replace_all_uses_with(back, delete_user_cb=lambda user: user is not flat)
        flat.name = "merged"
        return program

    program = dealt(flattened(), Mesh.of(sp=3), {"merged": {0: Rows(("sp",), "tokens")}})
    assert count(program) == {take_rows: 1, collect_rows: 1}
    require_equal(program, original(), 2, length)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_total_of_one_ranks_rows_is_refused() -> None:
    program = dealt(original(), Mesh.of(sp=3), {"hidden": {1: TOKENS}})
    collect = next(node for node in program.graph.nodes if node.target is collect_rows)
    with program.graph.inserting_before(collect):
        own = program.graph.call_function(aten.sym_size.int, (collect.args[0], 1))
    own.meta = {"val": program.symbols["sequence"]}
    collect.args = (collect.args[0], own, collect.args[2])
    with pytest.raises(LayoutError, match=r"collects sequence rows of all ranks together, but its total"):
        check(program)


def test_the_size_of_one_ranks_rows_is_refused_for_what_has_all() -> None:
    """A view of the whole with as many tokens as a rank has of its own."""
    program = dealt(original(mixing=True), Mesh.of(sp=3), {"hidden": {1: TOKENS}})
    summed = next(node for node in program.graph.nodes if node.target is aten.cumsum.default)
    rows = next(node for node in program.graph.nodes if node.target is take_rows)
    with program.graph.inserting_after(summed):
        own = program.graph.call_function(aten.sym_size.int, (rows, 1))
    own.meta = {"val": program.symbols["sequence"]}
    with program.graph.inserting_after(own):
        viewed = program.graph.call_function(aten.reshape.default, (summed, [-1, own, handmade.HIDDEN]))
    viewed.meta = {"val": summed.meta["val"], "path": "model"}
    summed.replace_all_uses_with(viewed, delete_user_cb=lambda user: user is not viewed)
    with pytest.raises(LayoutError, match=r"takes a size from 'take_rows', of which each rank has sequence rows of sp"):
        check(program)


def test_a_number_of_rows_that_no_input_tells_is_refused() -> None:
    program = original().copy(Mesh.of(sp=2))
    node, user = named(program, "hidden"), named(program, "up")
    value = node.meta["val"]
    node.meta = {**node.meta, "val": Value((value.shape[0], sympy.Symbol("elsewhere"), value.shape[2]), value.dtype)}
    rewriter = Rewriter(program, {node: Layout((None, Rows(("sp",), "routed"), None))})
    with pytest.raises(LayoutError, match="hidden: how many rows all ranks have together, elsewhere, is no size of an"):
        rewriter.provide(user, node, REPLICATED(3))
