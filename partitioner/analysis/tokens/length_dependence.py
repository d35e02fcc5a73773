"""Whether values depend on how many tokens there are, other than by there being one row for each.

    x[B, S, H] * (1 / S)         a size taken for a number
    table[S - 1]                 a row chosen by the number of tokens
    ones[S].sum()                a number counted from rows that were made for that

Such a value is another one when the same tokens come in pieces, though no token looks at another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from partitioner.program.node_arguments import arguments, node_values, operation, symbols_of
from partitioner.program.program import Program, Value

aten = torch.ops.aten

__all__ = ["why_length_counts"]

_SIZES = {
    "size", "sizes", "shape", "start", "end", "length", "q_length", "kv_length", "split_size", "split_sizes", "repeats",
    "output_size", "pad",
}  # fmt: skip
"""Arguments that say how many rows there are, or which: what comes of it has a row per token, or is refused."""

_FILLED = {
    aten.empty_like, aten.full_like, aten.new_empty, aten.new_full, aten.new_ones, aten.new_zeros, aten.ones_like,
    aten.zeros_like,
}  # fmt: skip
"""Ops that ask a tensor for its shape and dtype only."""


def why_length_counts(program: Program) -> str | None:
    """The first op, in graph order, whose result depends on the number of tokens; None: there is none."""
    sequence = program.symbols["sequence"]
    made: set[fx.Node] = set()  # of sizes and weights alone
    for node in program.graph.nodes:
        if node.op != "call_function" or not node_values(node):
            continue
        has_rows = any(_depends(value, sequence) for value in node_values(node))
        numbers = {
            name for name, leaf in _leaves(node) if _is_number(leaf) and _depends(leaf.meta.get("val"), sequence)
        }
        read = [] if operation(node) in _FILLED else node.all_input_nodes
        sources = [n for n in read if node_values(n) and n.op != "get_attr"]
        if made.issuperset(sources):
            made.add(node)
            counted = any(_depends(value, sequence) for n in sources for value in node_values(n))
        else:
            counted = False
        if numbers - _SIZES or ((numbers or counted) and not has_rows):
            path = node.meta.get("path")
            where = f" in {path}" if path else ""
            return f"{operation(node).__name__} at {node.name!r}{where} computes with the number of tokens"
    return None


def _leaves(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """The nodes among a node's arguments, each with the argument it belongs to."""
    for name, value in arguments(node).items():
        found: list[fx.Node] = []
        fx.node.map_arg(value, found.append)
        yield from ((name, leaf) for leaf in found)


def _is_number(node: fx.Node) -> bool:
    return not node_values(node)


def _depends(value: Any, sequence: sympy.Symbol) -> bool:
    if isinstance(value, Value):
        return any(_depends(size, sequence) for size in value.shape)
    return sequence in symbols_of(value)
