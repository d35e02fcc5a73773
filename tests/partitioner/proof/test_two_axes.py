"""Splits over several axes and in several dims, and rows: inferred, checked, emitted, simulated; what is refused."""

from typing import Any

import pytest
import torch
from torch import fx

from partitioner.analysis.layouts.propagate_layouts import place
from partitioner.compile.emit import Emitter
from partitioner.compile.parts import Parts
from partitioner.compile.pass_manager.choose_passes import choose
from partitioner.compile.pass_manager.run_passes import run_passes
from partitioner.errors import LayoutError
from partitioner.program.program import Entry, PerRankInt, Program, Value
from partitioner.proof.layouts import check
from partitioner.sharding.layout import REPLICATED, Layout, Split, points
from partitioner.sharding.mesh import Mesh
from passes.tensor_parallel import _Rewriting
from runtime.ops.collectives import all_reduce
from runtime.ops.embedding import vocab_parallel_embedding
from runtime.ops.rows import collect_rows
from tests.support import handmade, partitioned

aten = torch.ops.aten


def over(mesh: Mesh, axes: tuple[str, ...], size: int) -> Split | None:
    """Uneven where the sizes do not divide; whole where the axes have one rank."""
    axes = tuple(axis for axis in axes if mesh.size(axis) > 1)
    return Split(axes, handmade.cut(size, mesh.size(*axes))) if axes else None


def placed(traced: Program, mesh: Mesh, weights: dict[str, Layout]) -> Program:
    """A program whose weights are laid out by hand; all else follows, and is checked."""
    program = traced.copy(mesh)
    placement = place(program, weights)
    program.weight_layouts.update({name: layout for name, layout in placement.weights.items() if layout.axes})
    _Rewriting(program, placement, "tp").run()
    check(program)
    return program


def two_axes(mesh: Mesh) -> Program:
    """Every weight divided over dp and tp: in one dim over both, or in two dims."""
    vocabulary = over(mesh, ("dp", "tp"), handmade.VOCABULARY)
    hidden, ffn = over(mesh, ("dp",), handmade.HIDDEN), over(mesh, ("tp",), handmade.FFN)
    return placed(
        handmade.plain(),
        mesh,
        {
            "model.embed.weight": Layout((vocabulary, None)),
            "model.up.weight": Layout((ffn, hidden)),
            "model.down.weight": Layout((hidden, ffn)),
            "head.weight": Layout((vocabulary, None)),
        },
    )


@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (2, 3), (3, 2), (1, 4), (4, 1)])
def test_weights_over_two_axes_equal_the_whole(dp: int, tp: int) -> None:
    program = two_axes(Mesh.of(dp=dp, tp=tp))
    ids = handmade.input_ids(batch=3, length=5)
    expected = Parts(handmade.plain(), None).simulate(input_ids=ids)
    found = Parts(program, None).simulate(input_ids=ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_weight_split_in_two_dims_is_held_in_blocks() -> None:
    mesh = Mesh.of(dp=2, tp=3)
    emitter = Emitter(two_axes(mesh))
    shapes = set()
    for place_ in points(mesh, ("dp", "tp")):
        (weight,) = [w for w in emitter.rank(place_).weights if w.name == "model.up.weight"]
        shapes.add(weight.local_shape)
        assert len(weight.pieces) == 1
    assert shapes == {(3, 3), (4, 3)}  # 10 rows over 3 ranks, 6 columns over 2


@pytest.mark.parametrize("tp", [2, 3])
def test_a_real_model_on_a_mesh_with_replicas(tp: int) -> None:
    program = partitioned.traced("llama")[1].copy(Mesh.of(dp=2, tp=tp))
    parts = Parts(run_passes(program, [choose("tensor-parallel")]), None)
    assert partitioned.error("llama", parts, 7) < partitioned.EXACT
    graphs = {id(parts.rank(rank).graph) for rank in range(parts.mesh.world_size)}
    assert len(graphs) == tp  # replicas run one graph


def test_a_real_model_with_weights_over_two_axes_in_two_dims() -> None:
    """The embedding's rows over both axes, the MLP's matrices in two dims."""
    traced = partitioned.traced("llama")[1]
    mesh = Mesh.of(dp=2, tp=2)
    layouts = {}
    for name, weight in traced.weights.items():
        if name.endswith(("up_proj.weight", "gate_proj.weight")):
            rows, columns = over(mesh, ("tp",), weight.shape[0]), over(mesh, ("dp",), weight.shape[1])
            layouts[name] = Layout((rows, columns))
        elif name.endswith("down_proj.weight"):
            layouts[name] = Layout((over(mesh, ("dp",), weight.shape[0]), over(mesh, ("tp",), weight.shape[1])))
        elif name.endswith("embed_tokens.weight"):
            layouts[name] = Layout((over(mesh, ("dp", "tp"), weight.shape[0]), None))
    assert len(layouts) == 7
    parts = Parts(placed(traced, mesh, layouts), None)
    assert partitioned.error("llama", parts, 5) < partitioned.EXACT


# -- what is refused ---------------------------------------------------------------------------------------------------


def node_calling(program: Program, op: object) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is op)


def test_right_numbers_over_the_wrong_axis_are_refused() -> None:
    mesh = Mesh.of(dp=2, tp=2)
    program = placed(
        handmade.plain(), mesh, {"model.embed.weight": Layout((over(mesh, ("tp",), handmade.VOCABULARY), None))}
    )
    node = node_calling(program, vocab_parallel_embedding)
    start = node.kwargs["start"]
    assert isinstance(start, PerRankInt)
    entry = program.table[start.name]
    program.table[start.name] = Entry(entry.whole, ("dp",), entry.values)
    with pytest.raises(LayoutError, match=rf"'{node.name}'.*start must be"):
        check(program)


def test_a_sum_completed_over_one_of_two_axes_is_refused() -> None:
    program = two_axes(Mesh.of(dp=2, tp=2))
    node = node_calling(program, all_reduce)
    assert node.args[1] == ("dp", "tp")
    node.args = (node.args[0], "tp")
    node.meta.pop("layout")
    with pytest.raises(LayoutError, match="partial over dp"):
        check(program)


def rows_program(first: tuple[str, ...], second: tuple[str, ...], *, collected: bool = True) -> Program:
    """relu(rows of x) + rows of x, collected."""
    mesh = Mesh.of(sp=2, tp=2)
    program = handmade.plain().copy(mesh)
    logits = program.graph.output_node().args[0]
    with program.graph.inserting_before(program.graph.output_node()):
        mine = handmade.rows_of(program, logits, first)
        act = program.graph.call_function(aten.relu.default, (mine,))
        act.meta = {"val": logits.meta["val"], "path": "model"}
        total = program.graph.call_function(aten.add.Tensor, (act, handmade.rows_of(program, logits, second)))
        total.meta = {"val": logits.meta["val"], "path": "model"}
        if collected:
            length = program.graph.call_function(aten.sym_size.int, (logits, 1))
            length.meta = {"val": logits.meta["val"].shape[1]}
            whole = program.graph.call_function(collect_rows, (total, length, first), {"dim": 1})
            whole.meta = {"val": logits.meta["val"], "path": "model"}
            total = whole
    program.graph.output_node().args = (total,)
    return program


def test_rows_of_one_kind_go_together() -> None:
    check(rows_program(("sp",), ("sp",)))


def test_rows_of_other_ranks_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"'add_.*' in model: rows meet other ranks' rows"):
        check(rows_program(("sp",), ("tp",)))


def test_rows_are_not_the_result() -> None:
    with pytest.raises(LayoutError, match=r"node 'output' requires .* to be \[\*, \*, \*\], got .*rows of sp"):
        check(rows_program(("sp",), ("sp",), collected=False))


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        (aten.softmax.int, (1,), "requires its operand"),
        (aten.flip.default, ([1],), "works along dim 1|mixes"),
        (aten.slice.Tensor, (1, 0, 2), "works along dim 1"),
        (aten.repeat.default, ([1, 2, 1],), "works along dim 1"),
        (aten.repeat.default, ([1, 1, 2],), None),
        (aten.relu.default, (), None),
        (aten.softmax.int, (2,), None),
        (aten.slice.Tensor, (2, 0, 2), None),
    ],
)
def test_what_may_be_done_with_rows(op: object, args: tuple[object, ...], message: str | None) -> None:
    program = rows_program(("sp",), ("sp",))
    act = next(node for node in program.graph.nodes if node.target is aten.relu.default and node.name != "act")
    with program.graph.inserting_after(act):
        made = program.graph.call_function(op, (act, *args))
    shape = list(act.meta["val"].shape)
    if op is aten.slice.Tensor:
        shape[int(str(args[0]))] = 2
    if op is aten.repeat.default:
        repeats: Any = args[0]
        shape = [times * size for times, size in zip(repeats, shape, strict=True)]
    made.meta = {"val": Value(tuple(shape), act.meta["val"].dtype), "path": "model"}
    if message is None:
        check(program)
        return
    with pytest.raises(LayoutError, match=message):
        check(program)


def test_a_view_with_the_size_of_all_rows_is_refused() -> None:
    """The local tensor has fewer rows than the size that is read from the whole one."""
    for stale in (False, True):
        program = rows_program(("sp",), ("sp",))
        act = next(node for node in program.graph.nodes if node.target is aten.relu.default and node.name != "act")
        source = act.all_input_nodes[0].all_input_nodes[0] if stale else act
        with program.graph.inserting_after(act):
            size = program.graph.call_function(aten.sym_size.int, (source, 1))
            size.meta = {"val": act.meta["val"].shape[1]}
        with program.graph.inserting_after(size):
            made = program.graph.call_function(aten.reshape.default, (act, [-1, size, handmade.VOCABULARY]))
        made.meta = {"val": act.meta["val"], "path": "model"}
        if stale:
            with pytest.raises(LayoutError, match=r"takes a size from .* which has all rows"):
                check(program)
        else:
            check(program)


def test_replicated_where_rows_are_wanted_is_refused() -> None:
    program = rows_program(("sp",), ("sp",))
    add = next(node for node in program.graph.nodes if node.target is aten.add.Tensor and "add_" in node.name)
    mine = add.args[1]
    assert isinstance(mine, fx.Node)
    add.args = (add.args[0], mine.args[0])
    with pytest.raises(LayoutError, match=r"requires its operand .* to be .*rows of sp"):
        check(program)
    assert REPLICATED(2).axes == frozenset()
