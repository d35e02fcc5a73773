"""The nodes of each layer's routed experts once they are dealt out, and over which axes ranks work together in them.

    localise_experts, or take_rows and expert_send
    expert_dispatch .. grouped_linear .. expert_combine
    expert_return, collect_rows

Ranks that work together on an expert must have the same tokens, or send each other theirs. A body says which axes those
are, so that whoever deals out tokens over one of them knows where all of them are needed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from partitioner.analysis.layouts.infer_experts import OWN
from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.program.node_arguments import arguments, node_values
from partitioner.program.program import Program
from partitioner.sharding.layout import Layout, Rows
from partitioner.sharding.mesh import AXES
from runtime.ops.communicating import as_axes
from runtime.ops.expert_exchange import expert_return, expert_send, localise_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear
from runtime.ops.rows import take_rows

__all__ = ["ExpertBody", "expert_bodies"]


@dataclass(frozen=True)
class ExpertBody:
    """sent: the axes over which tokens are sent. shared: those whose ranks compute parts for the same tokens."""

    dispatch: fx.Node
    nodes: frozenset[fx.Node]
    sent: frozenset[str]
    shared: frozenset[str]

    def takes_own(self, axis: str) -> bool:
        """Whether ranks along an axis of attention may come with tokens of their own.

        Not where they compute parts of the same, nor where experts' groups go across those of attention.
        """
        return axis not in self.shared and self.sent | self.shared <= set(AXES)


def expert_bodies(program: Program, layouts: Layouts) -> list[ExpertBody]:
    """Of a program whose weights are placed, and how its values are laid out."""
    nodes = list(program.graph.nodes)
    return [
        _body(node, nodes[place:], layouts)
        for place, node in enumerate(nodes)
        if node.op == "call_function" and node.target is expert_dispatch
    ]


def _body(dispatch: fx.Node, later: list[fx.Node], layouts: Layouts) -> ExpertBody:
    route = _route(dispatch)
    inside = {dispatch, *(source for source in dispatch.all_input_nodes if _source(source) is route)}
    sent, shared = set[str](), set[str]()
    if route is not None:
        inside.add(route)
        inside |= {user for user in route.users if user.target is operator.getitem}
        if route.target is expert_send:
            sent |= set(as_axes(arguments(route)["axis"]))
            inside |= {source for source in route.all_input_nodes if source.target is take_rows}
        else:
            shared |= set(arguments(route)["axes"])
    last = expert_return if sent else expert_combine
    ended = False
    for node in later[1:]:
        if not node_values(node) or not any(source in inside for source in node.all_input_nodes):
            continue
        if ended and not any(_is_dealt(layouts[s]) for s in node.all_input_nodes if s in inside):
            continue  # what made use of the tokens of all
        inside.add(node)
        if node.target is grouped_linear:
            shared |= _divided(node, layouts)
        ended |= node.target is last
    return ExpertBody(dispatch, frozenset(inside), frozenset(sent), frozenset(shared))


def _divided(node: fx.Node, layouts: Layouts) -> set[str]:
    """The axes that divide an expert's own matrices."""
    a = arguments(node)
    weights = [layouts[a[name]] for name in ("weight", "bias") if isinstance(a.get(name), fx.Node)]
    return {axis for layout in weights for dim in layout.dims[1:] if dim is not None for axis in dim.axes}


def _route(dispatch: fx.Node) -> fx.Node | None:
    source = _source(arguments(dispatch)["index"])
    return source if source is not None and source.target in (localise_experts, expert_send) else None


def _source(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.target is operator.getitem else None
    return source if isinstance(source, fx.Node) else None


def _is_dealt(layout: object) -> bool:
    """Whether it has the tokens that a rank sends, or those that came to it; not those of own sequences."""
    dims = layout.dims if isinstance(layout, Layout) else ()
    return any(isinstance(dim, Rows) and dim.kind not in OWN for dim in dims)
