"""Which results of nodes hold memory of their own, and from where to where: for the most that is alive at once.

    bytes      an expression        first, last      places of the node that makes it, and of the last that reads it

A view prolongs the life of what it is a view of; of several results of a node, each lives as long as it is read. Where
ops that go over memory one after the other are one kernel (`runtime.execution.fusion.fuse_elementwise`), what stands
between them is never written, and their operands live until the kernel has run: `fused_chain` are the nodes as that
pass leaves them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from partitioner.analysis.cost.expressions import Expressions, NodeExpression
from partitioner.program.node_arguments import arguments, node_values, operation
from partitioner.program.torch_calls import lowered_call
from runtime.execution.fusion.fuse_elementwise import fused

__all__ = ["Live", "chain", "fused_chain", "live_results"]

_ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_OF = "planned"
"""In `meta` of a node: the one of the program that it stands for."""


@dataclass(frozen=True)
class Live:
    """A result: its bytes, the node that makes it and the last that reads it, by place among the nodes."""

    bytes: Any
    first: int
    last: int


def chain(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes in a graph of their own: what they read of others comes in, what others read goes out."""
    return _calls(_graph(nodes))


def fused_chain(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The same as a GPU runs them, where it does."""
    return _calls(fused(_graph(nodes)))


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _graph(nodes: Sequence[fx.Node]) -> fx.Graph:
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    mine = set(nodes)
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in copied:
                outer = copied[source] = graph.placeholder(source.name)
                outer.meta = {**source.meta, _OF: source}
        new = copied[node] = graph.node_copy(node, copied.__getitem__)
        new.op, new.target = lowered_call(node.target, node.args, node.kwargs) or (node.op, node.target)
        new.meta = {**node.meta, _OF: node}
    graph.output(tuple(copied[node] for node in nodes if any(user not in mine for user in node.users)))
    return graph


def live_results(nodes: Sequence[fx.Node], entry: Expressions, costs: Mapping[fx.Node, NodeExpression]) -> list[Live]:
    """nodes: of `chain` or `fused_chain`. entry, costs: of the program whose nodes they stand for."""
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    first: dict[fx.Node, int] = {}
    size: dict[fx.Node, Any] = {}
    scores: dict[int, Any] = {}

    def made_by(node: fx.Node) -> Any:
        return entry.bytes(node.meta[_OF]) if _OF in node.meta else 0  # of a kernel with several results, these have it

    for i, node in enumerate(nodes):
        sources = [each for each in node.all_input_nodes if _holds(each)]
        for source in sources:
            base = owner.setdefault(source, source)
            if base not in size:  # comes from the nodes before
                size[base], first[base] = made_by(base), 0
            last[base] = i
        planned = node.meta.get(_OF)
        cost = None if planned is None else costs.get(planned)
        is_view = cost is not None and cost.kind == "move" and cost.written == 0
        made = sources[0] if operation(node) is operator.getitem and sources else None
        if made is not None and owner.get(made) is made:
            size[made] = 0
            owner[node], first[node], size[node] = node, first[made], made_by(node)
        elif is_view and sources:
            owner[node] = owner.get(sources[0], sources[0])
        else:
            owner[node], first[node], size[node] = node, i, made_by(node)
        if planned is not None and cost is not None and cost.kind == "attention":
            scores[i] = _scores(planned, cost)
        if any(user.op == "output" for user in node.users):
            last[owner[node]] = len(nodes)
        else:
            last.setdefault(owner[node], i)
    found = [Live(size[node], first[node], last.get(node, first[node])) for node in size]
    return found + [Live(each, place, place) for place, each in scores.items() if each != 0]


def _holds(source: fx.Node) -> bool:
    """Whether it is a tensor that a node of the program has made."""
    planned = source.meta.get(_OF)
    return planned is None or (planned.op not in ("get_attr", "placeholder") and bool(node_values(planned)))


def _scores(node: fx.Node, cost: NodeExpression) -> Any:
    """Bytes inside an attention that no kernel computes piece by piece: one with a soft cap or sinks
    (`runtime.ops.attention`), which has all scores at once, before and after a step, and of the cap once more.
    """
    a = arguments(node)
    if a.get("softcap") is None and a.get("sinks") is None and not a.get("written_out"):
        return 0
    rows, heads, _, _, queries, keys, _ = cost.product
    return (2 if a.get("softcap") is None else 3) * rows * heads * queries * keys * max(4, _ITEM[cost.dtype])
