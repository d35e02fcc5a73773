"""In which order the tokens of several sequences lie along one dim: those of the first, then those of the next.

    [B, S, H] -> reshape -> [B S, H]    in order: a rank's own tokens of each sequence can be told apart again
    [S, B, H] -> reshape -> [S B, H]    not so

Layouts say that a dim runs over own tokens, among others; who collects or deals out such a dim must know where each
sequence begins.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import fx

from partitioner.program.node_arguments import node_values, operation

__all__ = ["sequences_in_order"]

aten = torch.ops.aten
_VIEWS = (aten.view, aten.reshape, aten._unsafe_view, aten.flatten)


def sequences_in_order(node: fx.Node, dim: int, symbol: sympy.Symbol) -> bool:
    """Whether `dim` of a value that is made token by token was merged of sequences and, within these, of `symbol`.

    False where that cannot be told.
    """
    size = _shape(node)[dim]
    seen: set[fx.Node] = set()
    while node not in seen:
        seen.add(node)
        sources = [source for source in node.all_input_nodes if node_values(source)]
        if node.op == "call_function" and operation(node) in _VIEWS and (merged := _merges(node, dim, symbol)):
            return merged == "in order"
        found = [(source, i) for source in sources for i, each in enumerate(_shape(source)) if each == size]
        if not found:
            return False
        node, dim = found[0]
    return False


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node_values(node)[0].shape)


def _merges(node: fx.Node, dim: int, symbol: sympy.Symbol) -> str | None:
    """Whether a view makes `dim` of several, and how; None where that dim was there before."""
    (source, *_) = node.all_input_nodes
    before, after = _shape(source), _shape(node)
    if after[dim] in before:
        return None
    start, end = math.prod(after[:dim]), math.prod(after[: dim + 1])
    for i, size in enumerate(before):
        if size == symbol and math.prod(before[: i + 1]) == end and any(
            math.prod(before[:first]) == start for first in range(i + 1)
        ):  # fmt: skip
            return "in order"
    return "otherwise"
