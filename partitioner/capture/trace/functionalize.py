"""Rewrite in-place ops to pure ones, so that no node depends on which tensors share memory.

Every node is a base (its own memory) or a view of one. A write to a view becomes a pure op, and its result is put
back into the base (`select` -> `select_scatter`, and so on up the chain of views); whoever reads the base or another
view of it later reads a new version, made when it is first needed. What nobody reads again is dead code. The method
is torch's functionalization; done on the finished graph it needs no second trace, which would take as long as the
first.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from partitioner.capture.layers.share_layers import BLOCK, NotSharedError
from partitioner.errors import CaptureError

__all__ = ["draws", "functionalize"]

aten = torch.ops.aten


class _UnsupportedError(Exception):
    """A view or a write that the tables below do not hold."""


def functionalize(exported: ExportedProgram) -> ExportedProgram:
    """`exported` without in-place ops; changed in place where the tables below suffice."""
    module = exported.graph_module
    names = {spec.arg.name for spec in exported.graph_signature.input_specs if spec.target is not None}
    if not any(is_in_place(node) or _hides_writes(node) for node in module.graph.nodes):
        return exported
    try:
        _Functionalizer(module.graph, weights=names).run()
        return exported
    except _UnsupportedError:
        if any(node.target is BLOCK for node in module.graph.nodes):
            raise NotSharedError("writes in place that need the trace as a whole") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 warns about its own use of a deprecated class
        exported = exported.run_decompositions({})
    for node in exported.graph.nodes:
        if is_in_place(node):
            raise CaptureError(f"cannot make {node.target} functional: it writes to {node.args[0]}")
    return exported


def is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and _mutates(node.target)


_known: dict[torch._ops.OpOverload, bool] = {aten.detach_.default: False}


def _mutates(target: torch._ops.OpOverload) -> bool:
    if target not in _known:
        _known[target] = target._schema.is_mutable
    return _known[target]


def draws(node: fx.Node) -> bool:
    """Whether an op yields random numbers, which are no function of what it is given."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    names = [argument.name for argument in target._schema.arguments]
    given = {argument.name: argument.default_value for argument in target._schema.arguments}
    given |= {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    trained = all(given.get(name) is not False for name in ("train", "training"))
    return trained and all(given.get(name) != 0 for name in ("dropout", "dropout_p", "p"))


def _hides_writes(node: Any) -> bool:
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    module = node.graph.owning_module
    bodies = [
        getattr(module, str(arg.target)) for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"
    ]
    return any(is_in_place(inner) for body in bodies if isinstance(body, fx.GraphModule) for inner in body.graph.nodes)


class _Functionalizer:
    """`parent[n]` is what n is a view of; `current[n]` is the node that holds n's value now, as of `stamp[n]` writes
    to its base.
    """

    def __init__(self, graph: fx.Graph, weights: set[str]) -> None:
        if any(_hides_writes(node) for node in graph.nodes):
            raise _UnsupportedError
        self.graph = graph
        self.weights = weights
        self.parent: dict[fx.Node, fx.Node] = {}
        self.current: dict[fx.Node, fx.Node] = {}
        self.stamp: dict[fx.Node, int] = {}
        self.writes: dict[fx.Node, int] = {}
        self.done: set[fx.Node] = set()
        """Writes already made pure."""

    def run(self) -> None:
        # a trial first: the graph is only changed once every write is known to be supported
        nodes = list(self.graph.nodes)
        for node in nodes:
            self._find_parent(node)
        for node in nodes:
            if is_in_place(node):
                self._check(node)
        for node in nodes:
            if node.op not in ("call_function", "output"):
                continue
            with self.graph.inserting_before(node):
                fresh = fx.node.map_arg((node.args, node.kwargs), self._latest)
            written = node.args[0] if is_in_place(node) else None
            node.args, node.kwargs = fresh
            if written is not None:
                self._write(node, written)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))

    def _find_parent(self, node: Any) -> None:
        if node.op != "call_function":
            return
        if is_in_place(node):
            self.parent[node] = node.args[0]
            return
        storage = _storage(node)
        if storage is None or not node.args or not isinstance(node.args[0], fx.Node):
            return
        source = node.args[0]
        if node.target is operator.getitem and source.target in _PIECES:
            source = source.all_input_nodes[0]
        if _storage(source) == storage:
            self.parent[node] = source
        elif any(_storage(arg) == storage for arg in node.all_input_nodes):
            raise _UnsupportedError

    def _base(self, node: fx.Node) -> fx.Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def _check(self, node: Any) -> None:
        if _pure(node.target) is None or not isinstance(node.args[0], fx.Node):
            raise _UnsupportedError
        view = node.args[0]
        while view in self.parent:
            if not is_in_place(view) and _view_op(view) not in _PUT_BACK:
                raise _UnsupportedError
            view = self.parent[view]
        if view.name in self.weights:
            raise CaptureError(
                f"cannot capture {node.target}: it writes to the weight {view.name!r}, but a graph keeps no state"
            )

    def _latest(self, node: fx.Node) -> fx.Node:
        base = self._base(node)
        writes = self.writes.get(base, 0)
        if self.stamp.get(node, 0) == writes:
            return self.current.get(node, node)
        parent = self._latest(self.parent[node])  # a base is always up to date: a write updates it
        if is_in_place(node) or node in self.done:
            fresh = parent
        else:
            fresh = self._replay(node, parent)
        self.current[node], self.stamp[node] = fresh, writes
        return fresh

    def _replay(self, node: Any, parent: fx.Node) -> fx.Node:
        if node.target is operator.getitem:
            pieces = node.args[0]
            made = self.graph.call_function(pieces.target, (parent, *pieces.args[1:]), pieces.kwargs)
            made.meta = dict(pieces.meta)
            fresh = self.graph.call_function(operator.getitem, (made, node.args[1]))
        else:
            old = self.parent[node]
            args, kwargs = fx.node.map_arg((self._original_args(node)), lambda arg: parent if arg is old else arg)
            fresh = self.graph.call_function(node.target, args, kwargs)
        fresh.meta = dict(node.meta)
        return fresh

    def _original_args(self, node: fx.Node) -> Any:
        """The node's arguments with the node it is a view of in its first version."""
        first = self.parent[node]
        replaced = node.args[0]
        return fx.node.map_arg((node.args, node.kwargs), lambda arg: first if arg is replaced else arg)

    def _write(self, node: fx.Node, written: Any) -> None:
        self.done.add(node)
        last = _purify(self.graph, node)
        base = self._base(written)
        chain, view, value = [(node, last), (written, last)], written, last
        while view in self.parent:
            parent = self.parent[view]
            if view not in self.done:
                at = value.next
                with self.graph.inserting_before(at):
                    before = self._latest(parent)
                    value = self._put_back(view, before, value)
                value.meta = dict(parent.meta)
                if "nn_module_stack" in node.meta:  # in the module that writes, wherever the base comes from
                    value.meta["nn_module_stack"] = node.meta["nn_module_stack"]
            chain.append((parent, value))
            view = parent
        self.writes[base] = self.writes.get(base, 0) + 1
        for alias, now in chain:
            self.current[alias], self.stamp[alias] = now, self.writes[base]

    def _put_back(self, view: fx.Node, before: fx.Node, value: fx.Node) -> fx.Node:
        target, args = _PUT_BACK[_view_op(view)](view, before, value)
        return value if target is None else self.graph.call_function(target, args)


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _view_op(node: Any) -> Any:
    return (operator.getitem, node.args[0].target) if node.target is operator.getitem else node.target


Arguments = tuple[Any, ...]
PutBack = Callable[[Any, fx.Node, fx.Node], tuple[Any, Arguments]]


def _same(view: Any, before: fx.Node, value: fx.Node) -> tuple[Any, Arguments]:
    return None, ()


def _reshape(view: Any, before: fx.Node, value: fx.Node) -> tuple[Any, Arguments]:
    return aten.reshape_as.default, (value, before)


def _piece(view: Any, before: fx.Node, value: fx.Node) -> tuple[Any, Arguments]:
    pieces, index = view.args
    dim = pieces.args[2] if len(pieces.args) > 2 else pieces.kwargs.get("dim", 0)
    shapes = [piece.shape[dim] for piece in pieces.meta["val"]]
    if not all(isinstance(size, int) for size in shapes):
        raise CaptureError(f"cannot make a write to a piece of {pieces} functional: its sizes are not constants")
    start = sum(shapes[:index])
    return aten.slice_scatter.default, (before, value, dim, start, start + shapes[index])


def _inverse_permute(view: Any, before: fx.Node, value: fx.Node) -> tuple[Any, Arguments]:
    order = [dim % len(view.args[1]) for dim in view.args[1]]
    return aten.permute.default, (value, [order.index(dim) for dim in range(len(order))])


_PIECES = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
_PUT_BACK: dict[Any, PutBack] = {
    **dict.fromkeys((aten.alias.default, aten.detach.default, aten.detach_.default, aten.contiguous.default), _same),
    **dict.fromkeys((aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.lift_fresh_copy.default), _same),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim), _reshape),
    **dict.fromkeys((aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default), _reshape),
    **{(operator.getitem, target): _piece for target in _PIECES},
    aten.permute.default: _inverse_permute,
    aten.select.int: lambda view, before, value: (aten.select_scatter.default, (before, value, *view.args[1:])),
    aten.slice.Tensor: lambda view, before, value: (aten.slice_scatter.default, (before, value, *view.args[1:])),
    aten.transpose.int: lambda view, before, value: (aten.transpose.int, (value, *view.args[1:])),
}
"""How the new value of a view goes back into what it is a view of: (op, arguments), None where both are the same."""


def _pure(target: Any) -> Any:
    """The op that computes what an in-place op writes: `add_.Tensor` -> `add.Tensor`."""
    name = target._schema.name.removeprefix("aten::")
    if target.namespace != "aten" or not name.endswith("_"):
        return None
    if name in ("zero_", "fill_", "copy_"):
        return target
    packet = getattr(aten, name.removesuffix("_"), None)
    if packet is None or target._overloadname not in packet.overloads():
        return None
    pure = getattr(packet, target._overloadname)
    return None if pure._schema.is_mutable else pure


def _purify(graph: fx.Graph, node: Any) -> Any:
    """Make the write a pure op; returns the node with the value that was written, in the dtype of what was written
    to.
    """
    name = node.target._schema.name.removeprefix("aten::")
    written = node.args[0]
    if name == "zero_":
        node.target, node.args = aten.zeros_like.default, (written,)
    elif name == "fill_" and not isinstance(node.args[1], fx.Node):
        node.target = aten.full_like.default
    elif name in ("copy_", "fill_"):
        node.target, node.args, node.kwargs = aten.copy.default, node.args[:2], {}
    else:
        node.target = _pure(node.target)
        # x.add_(y) keeps the dtype of x, x + y may not
        before = node.meta["val"].dtype
        if _result_dtype(node) != before:
            with graph.inserting_after(node):
                cast = graph.call_function(aten.to.dtype, (node, before))
            cast.meta = dict(node.meta)
            return cast
    return node


def _result_dtype(node: Any) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    values: list[Any] = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if all(value.dtype == values[0].dtype for value in values) and values[0].is_floating_point():
        return values[0].dtype
    with values[0].fake_mode:
        return node.target(*args, **kwargs).dtype
