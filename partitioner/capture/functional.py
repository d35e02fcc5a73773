"""Rewrite in-place ops to pure ones where nobody else looks at the memory they write.

`y = x.add_(1)` may become `y = x + 1` if, after it, no other node reads the storage of x: then every later reader of x reads y.
Where a base or a view of it is read later, that is not so, and the graph is functionalised by torch (`run_decompositions`),
which is general, keeps the ops, and takes as long as the trace itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from partitioner.errors import CaptureError

__all__ = ["functionalize", "is_in_place"]

aten = torch.ops.aten


def functionalize(exported: ExportedProgram) -> ExportedProgram:
    """`exported`, changed in place where that suffices, without in-place ops."""
    module = exported.graph_module
    if _rewrite(module.graph, _inputs_of(module.graph)):
        return exported
    exported = exported.run_decompositions({})
    for node in exported.graph.nodes:
        if is_in_place(node):
            raise CaptureError(f"cannot make {node.target} functional, at {_path(node)}: torch left it in place")
    return exported


def is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and _mutates(node.target)


_known: dict[torch._ops.OpOverload, bool] = {aten.detach_.default: False}


def _mutates(target: torch._ops.OpOverload) -> bool:
    if target not in _known:
        _known[target] = target._schema.is_mutable
    return _known[target]


def _inputs_of(graph: fx.Graph) -> set[fx.Node]:
    return {node for node in graph.nodes if node.op in ("placeholder", "get_attr")}


def _rewrite(graph: fx.Graph, inputs: set[fx.Node]) -> bool:
    nodes = list(graph.nodes)
    writes = [node for node in nodes if is_in_place(node)]
    if any(isinstance(node.target, torch._ops.HigherOrderOperator) and _hides_writes(node) for node in nodes):
        return False
    if not writes:
        return True
    position = {node: i for i, node in enumerate(nodes)}
    sharing: dict[int, list[fx.Node]] = {}
    for node in nodes:
        for storage in _storages(node):
            sharing.setdefault(storage, []).append(node)
    for node in writes:
        written = node.args[0]
        pure = _pure(node.target)
        if not isinstance(written, fx.Node) or written in inputs or pure is None:
            return False
        here = position[node]
        for storage in _storages(written):
            for other in sharing[storage]:
                if other is written or position[other] >= here:
                    continue
                if other in inputs or any(position[user] > here for user in other.users):
                    return False
    for node in writes:
        written, here = node.args[0], position[node]
        for user in list(written.users):
            if position[user] > here:
                user.replace_input_with(written, node)
        _purify(graph, node)
    return True


def _hides_writes(node: fx.Node) -> bool:
    module = node.graph.owning_module
    bodies = [getattr(module, arg.target) for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"]
    return any(is_in_place(inner) for body in bodies if isinstance(body, fx.GraphModule) for inner in body.graph.nodes)


def _storages(node: fx.Node) -> set[int]:
    found: set[int] = set()
    fx.node.map_aggregate(
        node.meta.get("val"),
        lambda leaf: found.add(leaf.untyped_storage()._cdata) if isinstance(leaf, torch.Tensor) else None,
    )
    return found


def _pure(target: Any) -> torch._ops.OpOverload | None:
    """The op that computes what an in-place op writes: `add_.Tensor` -> `add.Tensor`."""
    name = target._schema.name.removeprefix("aten::")
    if target.namespace != "aten" or not name.endswith("_"):
        return None
    if name in ("zero_", "fill_", "copy_"):
        return target
    packet = getattr(aten, name.removesuffix("_"), None)
    if packet is None or target._overloadname not in packet.overloads():
        return None
    pure: torch._ops.OpOverload = getattr(packet, target._overloadname)
    return None if pure._schema.is_mutable else pure


def _purify(graph: fx.Graph, node: fx.Node) -> None:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    if name == "zero_":
        node.target, node.args = aten.zeros_like.default, (node.args[0],)
    elif name == "fill_":
        if isinstance(node.args[1], fx.Node):
            node.target = aten.copy.default
        else:
            node.target = aten.full_like.default
    elif name == "copy_":
        node.target, node.args = aten.copy.default, node.args[:2]
    else:
        node.target = _pure(node.target)
        # x.add_(y) keeps the dtype of x, x + y may not
        before = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
        if _result_dtype(node) != before:
            users = list(node.users)
            with graph.inserting_after(node):
                cast = graph.call_function(aten.to.dtype, (node, before))
            cast.meta = dict(node.meta)
            for user in users:
                user.replace_input_with(node, cast)


def _result_dtype(node: fx.Node) -> torch.dtype:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    values = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if all(value.dtype == values[0].dtype for value in values):
        return values[0].dtype
    with values[0].fake_mode:  # type: ignore[attr-defined]
        result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result.dtype


def _path(node: fx.Node) -> str:
    return next(reversed([path for path, _ in node.meta.get("nn_module_stack", {}).values()] or ["the model"]))
