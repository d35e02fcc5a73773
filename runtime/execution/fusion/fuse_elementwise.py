"""Ops that go over memory one after the other, as one: on a GPU they take as long as their bytes, not their arithmetic.

    x * cos + roll(x, -h) * sin                        ->  rotated(x, cos, sin, h)
    act(a) * b                                         ->  gated(a, b, act)
    s = a + b; n = rms_norm(s) or w * rms_norm(s)      ->  s, n = added_norm(a, b, .., w)

What is not a chain of these stays. A fused op computes in float32 and rounds once where the ops before rounded each
time. The ops look at what they are given (`operations.py`) and do as before where no kernel takes it: so it is enough
here that the graph is right, whatever the shapes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from runtime.execution.fusion.operations import added_norm, gated, rotated

__all__ = ["fused"]

_ADD, _MUL = frozenset({torch.add, operator.add}), frozenset({torch.mul, operator.mul})
_ACTIVATIONS: dict[Any, str] = {
    functional.silu: "silu",
    functional.gelu: "gelu",
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
}


def fused(graph: fx.Graph) -> fx.Graph:
    """A copy of a bound graph with fewer ops; those that end a chain keep their names."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    place = {node: index for index, node in enumerate(copy.nodes)}
    for node in list(copy.nodes):
        if _is_call(node, _ADD):
            _rotation(node)
        elif _is_call(node, _MUL):
            _gate(node)
        elif _is_call(node, {torch.rms_norm}):
            _norm(node, place)
    copy.eliminate_dead_code(is_impure_node=lambda node: node.op != "call_function" or node.target not in _CHAINED)
    copy.lint()
    return copy


_CHAINED: set[Any] = {*_ADD, *_MUL, torch.roll, torch.rms_norm, *_ACTIVATIONS}
"""What may go once nobody reads it."""


def _rotation(node: Any) -> None:
    for straight, turned in (node.args, reversed(node.args)):
        if not (_is_call(straight, _MUL) and _is_call(turned, _MUL) and _has_one_user(straight, turned)):
            continue
        for rolled, sin in (turned.args, reversed(turned.args)):
            if not (_is_call(rolled, {torch.roll}) and _has_one_user(rolled) and len(rolled.args) == 3):
                continue
            x, shifts, dims = rolled.args
            if x not in straight.args or list(dims) != [-1] or len(shifts) != 1:
                continue
            cos = straight.args[1] if straight.args[0] is x else straight.args[0]
            if isinstance(cos, fx.Node) and isinstance(sin, fx.Node):
                node.target, node.args, node.kwargs = rotated, (x, cos, sin, -shifts[0]), {}
                return


def _gate(node: Any) -> None:
    for activated, other in (node.args, reversed(node.args)):
        if not (_is_call(activated, _ACTIVATIONS) and _has_one_user(activated) and isinstance(other, fx.Node)):
            continue
        approximate, in_place = activated.kwargs.get("approximate", "none"), activated.kwargs.get("inplace", False)
        if len(activated.args) == 1 and not in_place and other is not activated:
            name = _ACTIVATIONS[activated.target] + ("_tanh" if approximate == "tanh" else "")
            node.target, node.args, node.kwargs = gated, (activated.args[0], other, name), {}
            return


def _norm(norm: Any, place: dict[fx.Node, int]) -> None:
    """The sum is computed where the norm is: nobody must read it before."""
    if norm.kwargs or len(norm.args) != 4:
        return
    total, size, weight, eps = norm.args
    if not _is_call(total, _ADD):
        return
    end: Any = norm
    scaled: Any = next(iter(norm.users), None)
    if weight is None and _has_one_user(norm) and _is_call(scaled, _MUL):
        other = scaled.args[1] if scaled.args[0] is norm else scaled.args[0]
        if isinstance(other, fx.Node) and other is not norm:
            end, weight = scaled, other
    a, b = total.args
    others = [user for user in total.users if user not in (norm, end)]
    if (end is not norm and end in total.users) or any(place[user] < place[end] for user in others):
        return
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return
    with end.graph.inserting_before(end):
        both = end.graph.call_function(added_norm, (a, b, size, weight, eps), {"scales": end is not norm})
        moved = end.graph.call_function(operator.getitem, (both, 0))
    moved.meta = dict(total.meta)
    place[both] = place[moved] = place[end]
    end.target, end.args = operator.getitem, (both, 1)
    for user in others:
        user.replace_input_with(total, moved)


def _is_call(node: Any, targets: Any) -> bool:
    """Of one of these functions, with nothing but operands: an `alpha` would stand among the keywords."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in targets:
        return False
    return targets not in (_ADD, _MUL) or (len(node.args) == 2 and not node.kwargs)


def _has_one_user(*nodes: Any) -> bool:
    return all(len(node.users) == 1 for node in nodes)
