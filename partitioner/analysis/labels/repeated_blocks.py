"""Identical layers, found by structure: the analysis looks at the first two of each kind and repeats what it learned.

A block is a contiguous run of nodes whose module paths share a prefix up to their first number ("model.layers.7").
Two blocks are of one kind when their ops, constants, shapes and wiring agree. A later block of a known kind is
bypassed: its outputs stand for its inputs of the same shape. What is learned is checked on the whole graph afterwards
(see `infer`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from partitioner.program.node_arguments import node_values
from partitioner.program.program import Program

__all__ = ["Block", "Blocks", "find_blocks"]

_KEPT = 2
"""Blocks of each kind that are analysed: two, so that what flows from one into the next is seen."""


@dataclass
class Block:
    """nodes: in graph order, without weights. weights: names in order of first use. kind: equal for identical
    layers.
    """

    nodes: list[fx.Node]
    weights: list[str]
    kind: int
    bypass: dict[fx.Node, fx.Node] | None = None
    """For a block that is not analysed: output node -> the input node it stands for."""
    model: Block | None = None
    """For a block that is not analysed: the block it repeats."""


@dataclass
class Blocks:
    """All blocks of a graph, and the nodes to analyse."""

    blocks: list[Block]
    program: Program

    def __post_init__(self) -> None:
        self._bypassed = {node: block for block in self.blocks if block.bypass for node in block.nodes}
        self._members: dict[tuple[int, int], list[str]] = defaultdict(list)
        self._place: dict[str, tuple[int, int]] = {}
        for block in self.blocks:
            for i, weight in enumerate(block.weights):
                self._members[block.kind, i].append(weight)
                self._place[weight] = (block.kind, i)
        self._node_place = {n.name: (b.kind, i) for b in self.blocks for i, n in enumerate(b.nodes)}
        self._node_members: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, place in self._node_place.items():
            self._node_members[place].append(name)

    def same_weights(self, weight: str) -> list[str]:
        """The weight and those in the same place of identical layers."""
        return self._members[self._place[weight]] if weight in self._place else [weight]

    def same_nodes(self, node: str) -> list[str]:
        return self._node_members[self._node_place[node]] if node in self._node_place else [node]

    def is_analysed(self, node: fx.Node) -> bool:
        """Whether the node was looked at itself, not only one in the same place of an identical layer."""
        return node not in self._bypassed

    @property
    def analysed(self) -> int:
        return sum(block.bypass is None for block in self.blocks)

    def steps(self) -> Iterable[fx.Node | tuple[fx.Node, fx.Node]]:
        """Nodes to analyse in order; a pair (output, input) where a block is bypassed."""
        done: set[int] = set()
        for node in self.program.graph.nodes:
            block = self._bypassed.get(node)
            if block is None:
                yield node
            elif id(block) not in done:
                done.add(id(block))
                assert block.bypass is not None
                yield from block.bypass.items()


def _prefix(node: fx.Node) -> str | None:
    parts = str(node.meta.get("path", "")).split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return None


def find_blocks(program: Program, *, apart: Container[str] = (), compress: bool = True) -> Blocks:
    """The blocks of a program; with `compress=False` every block is analysed by itself.

    apart: weights that the plan treats unlike those in the same place of other layers, so that their layer is not of
    the others' kind.
    """
    order = [n for n in program.graph.nodes if n.op == "call_function"]
    place = {node: i for i, node in enumerate(order)}
    runs: dict[str, list[int]] = defaultdict(list)
    for node in order:
        if (prefix := _prefix(node)) is not None:
            runs[prefix].append(place[node])
    spans = sorted((min(found), max(found)) for found in runs.values())
    spans = [s for i, s in enumerate(spans) if all(s[1] < o[0] or o[1] < s[0] for j, o in enumerate(spans) if j != i)]
    if not compress:
        spans = []
    uses: dict[str, set[fx.Node]] = defaultdict(set)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            uses[str(node.target)].update(node.users)
    kinds: dict[Any, int] = {}
    seen: dict[int, list[Block]] = defaultdict(list)
    blocks = []
    for a, b in spans:
        nodes = order[a : b + 1]
        signature, outside, weights = _signature(program, nodes, apart)
        if any(not uses[weight] <= set(nodes) for weight in weights):
            continue  # shared with another layer: what is learned here may not hold there
        block = Block(nodes, weights, kinds.setdefault(signature, len(kinds)))
        if len(seen[block.kind]) >= _KEPT:
            block.bypass = _bypass(nodes, outside)
            block.model = seen[block.kind][-1] if block.bypass is not None else None
        if block.bypass is None:
            seen[block.kind].append(block)
        blocks.append(block)
    return Blocks(blocks, program)


def _signature(program: Program, nodes: list[fx.Node], apart: Container[str]) -> tuple[Any, list[fx.Node], list[str]]:
    local = {node: i for i, node in enumerate(nodes)}
    outside: dict[fx.Node, int] = {}
    weights: dict[str, int] = {}

    def refer(node: fx.Node) -> Any:
        if node in local:
            return ("in", local[node])
        if node.op == "get_attr":
            name = str(node.target)
            return ("weight", weights.setdefault(name, len(weights)), program.weights[name].shape, name in apart)
        return ("out", outside.setdefault(node, len(outside)), str(node.meta.get("val")))

    lines = []
    for node in nodes:
        # layers differ in the names of their states, if in nothing else
        keywords = {key: value for key, value in node.kwargs.items() if key != "state"}
        args = fx.node.map_arg((node.args, tuple(sorted(keywords.items()))), refer)
        lines.append((str(node.target), repr(args), str(node.meta.get("val"))))
    return tuple(lines), list(outside), list(weights)


def _bypass(nodes: list[fx.Node], outside: list[fx.Node]) -> dict[fx.Node, fx.Node] | None:
    """Pairs each output of the block with an input of the same shape; None where that cannot be done."""
    inside = set(nodes)
    free = list(outside)
    pairs = {}
    for node in nodes:
        if all(user in inside for user in node.users):
            continue
        match = next((n for n in free if node_values(n) == node_values(node) and node_values(n)), None)
        if match is None:
            return None
        free.remove(match)
        pairs[node] = match
    return pairs
