"""Copying nodes into another graph: what Graph.node_copy does, faster, since graphs are copied once per rank.

Graph.create_node looks through all arguments for symbolic integers of a trace, to warn of them, which costs more than
all else. A program holds none, so a node is made without arguments and is given them afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

__all__ = ["append_node", "copy_graph", "copy_node"]


def copy_graph(source: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of `source`, in which nodes have the same names, and the copy of each node but the output."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in source.nodes:
        if node.op == "output":
            result = fx.node.map_arg(node.args[0], copied.__getitem__)
            graph.output(result).meta = dict(node.meta)
        else:
            copied[node] = copy_node(graph, node, copied)
    for node, copy in copied.items():
        if copy.name != node.name:
            copy.name = node.name
    return graph, copied


def copy_node(graph: fx.Graph, node: fx.Node, copied: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A copy of `node` at the end of `graph`, which has the copies of its operands."""
    args = fx.node.map_arg(node.args, copied.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, copied.__getitem__) if node.kwargs else {}
    return append_node(graph, node, node.op, node.target, args, kwargs)


def append_node(graph: fx.Graph, like: fx.Node, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
    """A node at the end of `graph` with the name and the meta of `like`, of another graph."""
    made = graph.create_node(op, target, (), {}, like.name, like.type)
    if args:
        made.args = args
    if kwargs:
        made.kwargs = kwargs
    made.meta.update(like.meta)
    return made
