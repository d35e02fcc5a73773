"""Regions: what a graph computes in the modules that read and write a state per sequence.

    region     the nodes of the innermost module around the reads and writes of one layer's states
    x -> y..   the one value that the region is given, and those that it hands on, all [B, S, ..]

Beside these it takes weights and sizes. A layer whose region is given more is not told apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from partitioner.program.node_arguments import node_values
from partitioner.program.program import Program, Value
from runtime.ops.state import state_read, state_write

__all__ = ["Region", "regions_of"]


@dataclass(frozen=True)
class Region:
    """See the module's docstring. text: the same for regions that compute the same of other weights."""

    path: str
    nodes: tuple[fx.Node, ...]
    input: fx.Node
    outputs: tuple[fx.Node, ...]
    """In the order of the graph."""
    states: tuple[str, ...]
    weights: tuple[str, ...]
    text: str

    @property
    def reads(self) -> set[fx.Node]:
        return {node for node in self.nodes if node.target is state_read}

    @property
    def writes(self) -> set[fx.Node]:
        return {node for node in self.nodes if node.target is state_write}


def regions_of(program: Program) -> dict[tuple[str, ...], Region] | str:
    """By the names of their states; or why they are not told apart."""
    paths: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.target in (state_read, state_write):
            name, path = str(node.kwargs["state"]), str(node.meta.get("path") or "")
            paths[name] = _common(paths[name], path) if name in paths else path
    found: dict[tuple[str, ...], Region] = {}
    for path in _apart(paths.values()):
        states = tuple(name for name, at in paths.items() if _is_within(at, path))
        region = _region(program, path, states)
        if isinstance(region, str):
            return f"{path or 'the model'}: {region}"
        found[states] = region
    return found


def _common(one: str, other: str) -> str:
    """The innermost module around both."""
    same = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        same.append(a)
    return ".".join(same)


def _is_within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def _apart(paths: Iterable[str]) -> list[str]:
    """The outermost of these modules."""
    distinct = list(dict.fromkeys(paths))
    return [path for path in distinct if not any(path != other and _is_within(path, other) for other in distinct)]


def _region(program: Program, path: str, states: tuple[str, ...]) -> Region | str:
    if not path:
        return "its states are kept outside of any layer"
    inside = {
        node
        for node in program.graph.nodes
        if node.op == "call_function" and node.meta.get("path") and _is_within(str(node.meta["path"]), path)
    }
    inside |= {node for node in program.graph.nodes if node.kwargs.get("state") in states}
    inside = _closed(program.graph, inside)
    tensors = {n for node in inside for n in node.all_input_nodes if node_values(n)} - inside
    given = [n for n in tensors if n.op != "get_attr" and not _is_told(n, inside)]
    nodes = tuple(node for node in program.graph.nodes if node in inside)
    handed = tuple(n for n in nodes if any(user not in inside for user in n.users))
    if len(given) != 1 or not handed:
        return f"it is given {len(given)} values and hands on {len(handed)}: one must come in, and at least one go out"
    for what, node in (("given", given[0]), *(("handed on", each) for each in handed)):
        value = node.meta["val"]
        sizes = (program.symbols.get("batch"), program.symbols.get("sequence", 1))
        if not isinstance(value, Value) or value.shape[:2] != sizes:
            return f"what it is {what} is {value}, not one row per token"
    weights = tuple(dict.fromkeys(str(n.target) for node in nodes for n in node.all_input_nodes if n.op == "get_attr"))
    text = _text(program, nodes, given[0])
    return Region(path, nodes, given[0], handed, states, weights, text)


def _is_told(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether only reads and writes of states take it: how many rows there are, and which of them are active."""
    users = [user for user in node.users if user in inside]
    return node.op == "placeholder" and all(
        user.target is state_read or (user.target is state_write and user.args[1] is node) for user in users
    )


def _closed(graph: fx.Graph, inside: set[fx.Node]) -> set[fx.Node]:
    """With all that lies on the way from one of the nodes to another."""
    after, before = set(inside), set(inside)
    for node in graph.nodes:
        if any(n in after for n in node.all_input_nodes):
            after.add(node)
    for node in reversed(graph.nodes):
        if any(user in before for user in node.users):
            before.add(node)
    return {node for node in after & before if node.op == "call_function" and node_values(node)}


def _text(program: Program, nodes: tuple[fx.Node, ...], given: fx.Node) -> str:
    numbers = {node: f"%{i}" for i, node in enumerate(nodes)}

    def name(node: fx.Node) -> Any:
        if node in numbers:
            return numbers[node]
        if node.op == "get_attr":
            weight = program.weights[str(node.target)]
            return f"{weight.source}{list(weight.shape)}" + ("" if weight.source == "checkpoint" else str(node.target))
        return "x" if node is given else str(node.meta["val"])

    lines = []
    for node in nodes:
        args = fx.node.map_arg(node.args, name)
        kwargs = fx.node.map_arg({key: value for key, value in node.kwargs.items() if key != "state"}, name)
        lines.append(f"{node.target} {args} {kwargs}")
    return "\n".join(lines)
