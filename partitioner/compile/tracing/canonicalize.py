"""Spellings made one: what a trace writes in several ways is written in one, so that each rule is needed once.

x[:, :, [4]] with a constant index    ->  reorder(x, [4], dim=2): a move, where indexing needs the whole dim
cat([x, y[.., 0 elements]], dim)      ->  x
slice_scatter(x, y[.., 0 elements])   ->  x
broadcast_to(x, shape)                ->  expand(x, shape)
glu(x, dim)                           ->  a * sigmoid(b), where a, b are the halves of x: each on its own is a move
baddbmm(e, x, y, beta=0, alpha=a)     ->  a * bmm(x, y): e is not read, but would need a rank's size
expand(x, [B, M, 1]) @ y[B, 1, N]     ->  x * y: each number is one product, and no rows are copied to be multiplied
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from partitioner.program.node_arguments import arguments, operation
from partitioner.program.program import Program, Value
from runtime.ops.local import reorder

aten = torch.ops.aten

__all__ = ["canonicalize"]


def canonicalize(program: Program) -> None:
    """Rewrites the graph in place."""
    for node in list(program.graph.nodes):
        if node.op == "call_function" and operation(node) in (aten.index, aten.index_select):
            _constant_index(program, node)
        elif node.op == "call_function" and operation(node) is aten.cat:
            _empty_pieces(node)
        elif node.op == "call_function" and operation(node) is aten.slice_scatter:
            a = arguments(node)
            if 0 in a["src"].meta["val"].shape:
                node.replace_all_uses_with(a["self"])
        elif node.op == "call_function" and operation(node) is aten.broadcast_to:
            a = arguments(node)
            node.target, node.args, node.kwargs = aten.expand.default, (a["self"], a["size"]), {}
        elif node.op == "call_function" and operation(node) is aten.glu:
            _gated(program, node)
        elif node.op == "call_function" and operation(node) in _PRODUCTS:
            _product_alone(program, node)
        elif node.op == "call_function" and operation(node) in _MATMULS:
            _outer_product(program, node)
    program.graph.eliminate_dead_code()
    used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for name in [name for name in program.weights if name not in used]:
        del program.weights[name]


def _empty_pieces(node: fx.Node) -> None:
    a = arguments(node)
    shapes = {x: x.meta["val"].shape for x in a["tensors"]}
    # torch lets a 1-d tensor without elements stand beside tensors of any shape
    pieces = [x for x in a["tensors"] if shapes[x] != (0,) and shapes[x][a["dim"] or 0] != 0]
    if len(pieces) == 1:
        node.replace_all_uses_with(pieces[0])
    elif pieces and len(pieces) < len(a["tensors"]):
        node.args, node.kwargs = (pieces, a["dim"] or 0), {}


def _gated(program: Program, node: fx.Node) -> None:
    a = arguments(node)
    x, value = a["self"], node.meta["val"]
    half = value.shape[a["dim"]]
    if not isinstance(half, int):
        return
    with program.graph.inserting_before(node):
        halves = [
            program.graph.call_function(aten.slice.Tensor, (x, a["dim"], start, start + half)) for start in (0, half)
        ]
        gate = program.graph.call_function(aten.sigmoid.default, (halves[1],))
    for made in (*halves, gate):
        made.meta = dict(node.meta)
    node.target, node.args, node.kwargs = aten.mul.Tensor, (halves[0], gate), {}


_PRODUCTS = {
    aten.addmm: ("mat1", "mat2", aten.mm.default),
    aten.baddbmm: ("batch1", "batch2", aten.bmm.default),
}


def _product_alone(program: Program, node: fx.Node) -> None:
    a = arguments(node)
    if a["beta"] != 0:
        return
    first, second, product = _PRODUCTS[operation(node)]
    if a["alpha"] == 1:
        node.target, node.args, node.kwargs = product, (a[first], a[second]), {}
        return
    with program.graph.inserting_before(node):
        made = program.graph.call_function(product, (a[first], a[second]))
    made.meta = dict(node.meta)
    node.target, node.args, node.kwargs = aten.mul.Tensor, (made, a["alpha"]), {}


_MATMULS, _CASTS = {aten.matmul, aten.bmm, aten.mm}, {aten.to, aten._to_copy}


def _outer_product(program: Program, node: fx.Node) -> None:
    """A matmul that sums one product, where an operand was only repeated: the other one says how often."""
    operands = [n for n in node.args if isinstance(n, fx.Node)]
    values = [n.meta["val"] for n in operands]
    if len(values) != 2 or any(len(v.shape) < 2 or not v.dtype.is_floating_point for v in values):
        return
    if values[0].shape[-1] != 1 or values[1].shape[-2] != 1:
        return
    plain = [_before_repeated(program, n) for n in operands]
    shape = _broadcast([n.meta["val"].shape for n in plain])
    if plain != operands and shape == tuple(node.meta["val"].shape):
        node.target, node.args, node.kwargs = aten.mul.Tensor, tuple(plain), {}


def _before_repeated(program: Program, node: fx.Node) -> fx.Node:
    """What `node` repeats, cast as it is; itself where it repeats nothing."""
    if operation(node) is aten.expand:
        repeated: fx.Node = arguments(node)["self"]
        return repeated
    if operation(node) not in _CASTS or len(node.all_input_nodes) != 1:
        return node
    (source,) = node.all_input_nodes
    plain = _before_repeated(program, source)
    if plain is source:
        return node
    cast: Any = node.target
    with program.graph.inserting_before(node):
        made = program.graph.call_function(cast, (plain, *node.args[1:]), dict(node.kwargs))
    made.meta = {**node.meta, "val": Value(plain.meta["val"].shape, node.meta["val"].dtype)}
    return made


def _broadcast(shapes: list[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """The shape of what is computed of these element by element; None where they do not go together."""
    rank = max(map(len, shapes))
    found = []
    for sizes in zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True):
        several = {size for size in sizes if size != 1}
        if len(several) > 1:
            return None
        found.append(several.pop() if several else 1)
    return tuple(found)


def _constant_index(program: Program, node: fx.Node) -> None:
    a = arguments(node)
    if operation(node) is aten.index:
        given = [(dim, index) for dim, index in enumerate(a["indices"]) if index is not None]
        if len(given) != 1:
            return
        dim, index = given[0]
    else:
        dim, index = a["dim"], a["index"]
    if not isinstance(index, fx.Node) or index.op != "get_attr":
        return
    weight = program.weights[str(index.target)]
    value = program.weight_data[weight.name]
    source = a["self"].meta["val"]
    size = source.shape[dim]
    if weight.source != "constant" or value.dtype is not torch.int64 or value.ndim > 1 or not isinstance(size, int):
        return
    assert isinstance(source, Value)
    order = [i + size if i < 0 else i for i in value.reshape(-1).tolist()]
    path = node.meta.get("path", "")
    if value.ndim == 0 and operation(node) is aten.index:
        node.target, node.args, node.kwargs = aten.select.int, (a["self"], dim, order[0]), {}
    else:
        node.target, node.args, node.kwargs = reorder, (a["self"], order), {"dim": dim}
    node.meta["path"] = path
