"""Which split class each value of a laid-out program has: that of the weights it was made with.

    linear(x, w[heads])          the class of w's rows
    attention(q, k, v)           that of q; k and v have theirs
    element-wise, moves          that of the operand that is split the finest

A class has a symbol: how many of its groups the fullest rank holds. Names come from use: what attention splits are
heads and kv_heads, what a table of tokens has is the vocabulary, the rest of layers is ffn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from partitioner.analysis.labels.repeated_blocks import Blocks, find_blocks
from partitioner.program.node_arguments import arguments, layer_of, node_values, operation
from partitioner.program.program import Program
from partitioner.sharding.layout import REPLICATED, Layout, Split
from partitioner.sharding.split_class import SplitClass
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention
from runtime.ops.experts import grouped_linear
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention

__all__ = ["ValueClasses"]


class ValueClasses:
    """Of one program. `symbols`: per class the symbol of what a rank holds. `axes`: per class the axes it is split
    over: those of experts' own matrices are theirs.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.blocks: Blocks = find_blocks(program)
        self.symbols: dict[tuple[SplitClass, str], Any] = {}
        self._of: dict[fx.Node, tuple[SplitClass, str] | None] = {}
        self.guessed: list[str] = []
        """Nodes of which no class says how their split dims go on: they are counted as even shares."""
        self._repeated = {node for block in self.blocks.blocks if block.model is not None for node in block.nodes}
        self._roles = _roles(program)
        for node in program.graph.nodes:
            self._of[node] = self._class(node)

    def analysed(self) -> Iterator[fx.Node]:
        """The nodes in graph order, without those of layers that repeat another."""
        for node in self.program.graph.nodes:
            if node not in self._repeated:
                yield node

    def layouts(self, node: fx.Node) -> tuple[Layout, ...]:
        values = node_values(node)
        if node.op == "get_attr":
            return (self.program.layout_of(str(node.target)),)
        found = node.meta.get("layout")
        if isinstance(found, Layout):
            return (found,)
        return tuple(found) if found is not None else tuple(REPLICATED(len(value.shape)) for value in values)

    def local(self, node: fx.Node, constant: int, split: Split) -> Any:
        """How many of `constant` indices the fullest rank holds."""
        known = self._of.get(node)
        ranks = len(split.owned)
        if known is not None:
            kind = known[0]
            if constant * kind.held(ranks) == max(split.sizes) * kind.groups:
                return sympy.Rational(constant, kind.groups) * self._symbol(known)
        even = SplitClass(constant, constant)
        if even.held(ranks) == max(split.sizes):
            return self._symbol((even, known[1] if known else "ffn"))
        self.guessed.append(node.name)
        return max(split.sizes)

    def _symbol(self, known: tuple[SplitClass, str]) -> Any:
        if known not in self.symbols:
            taken = {str(symbol) for symbol in self.symbols.values()}
            name, number = known[1], 2
            while name in taken:
                name, number = f"{known[1]}_{number}", number + 1
            self.symbols[known] = sympy.Symbol(name, integer=True, positive=True)
        return self.symbols[known]

    def _class(self, node: fx.Node) -> tuple[SplitClass, str] | None:
        if not any(layout.split_dims for layout in self.layouts(node)):
            return None
        if node.op == "get_attr":
            found = self.program.split_classes.get(str(node.target))
            return (found, self._roles.get(str(node.target), "ffn")) if found is not None else None
        if operation(node) in (attention, cached_attention, latent_attention, latent_sequence_attention):
            return self._of.get(arguments(node)["q"])
        known = [self._of.get(source) for source in node.all_input_nodes]
        candidates = [each for each in known if each is not None]
        return max(candidates, key=lambda each: each[0].groups, default=None)


def _roles(program: Program) -> dict[str, str]:
    """By weight: what its split class is called."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        op = operation(node) if node.op == "call_function" else None
        if op is grouped_linear:
            found[str(arguments(node)["weight"].target)] = "expert_ffn"
        elif op in (attention, cached_attention, latent_attention, latent_sequence_attention):
            a = arguments(node)
            keys = ("key_weight", "value_weight") if op is not attention and op is not cached_attention else ("k", "v")
            for name, role in (("q", "heads"), *((name, "kv_heads") for name in keys)):
                for weight in _weights_of(a[name]):
                    found.setdefault(weight, role)
            for user in _readers_of(node):
                found.setdefault(user, "heads")
        elif op is not None and not layer_of(str(node.meta.get("path") or "")):
            for source in node.all_input_nodes:
                if source.op == "get_attr" and op is not torch.ops.aten.to:
                    found.setdefault(str(source.target), "vocabulary")
    return found


def _weights_of(node: fx.Node) -> list[str]:
    """The weights of the linears that a value comes from, through moves and element-wise ops."""
    return _matrices_read([node], lambda at: (n for n in at.all_input_nodes if layer_of(str(n.meta.get("path") or ""))))


def _readers_of(node: fx.Node) -> list[str]:
    """The weights that the next linear behind a value reads."""
    return _matrices_read(node.users, lambda at: at.users)


def _matrices_read(start: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> list[str]:
    """The matrices that are read by the first nodes, from `start` onward, that read any."""
    found: list[str] = []
    todo, seen = list(start), set()
    while todo:
        at = todo.pop()
        if at in seen or at.op != "call_function":
            continue
        seen.add(at)
        weights = [n for n in at.all_input_nodes if n.op == "get_attr" and len(node_values(n)[0].shape) > 1]
        found += [str(each.target) for each in weights]
        if not weights:
            todo += onward(at)
    return found
