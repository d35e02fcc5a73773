"""Tables that a model cuts to the tokens of a run, by how many came before: cut by position instead.

    table[1, .., P, ..][past : past + S]   ->   rows_at(table, position_ids)   [B, .., S, ..]

The cut is right for sequences that are all equally long; by position it is right for any. (A causal mask kept as a
buffer is such a table.) And a table cut to the number of slots says how many slots there may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from partitioner.program.program import Value
from runtime.ops.state import rows_at

aten = torch.ops.aten

__all__ = ["cut_by_position", "most_slots"]

_UNARY = {aten.slice.Tensor, aten.to.dtype, aten._to_copy.default, aten.logical_not.default, aten.bitwise_not.default}


def cut_by_position(graph: fx.Graph, positions: fx.Node, symbols: dict[str, sympy.Symbol]) -> None:
    """Rewrites each such cut of which nothing is made but what takes a table per sequence as well."""
    if not {"batch", "sequence", "slots"} <= symbols.keys():
        return
    batch, sequence, slots = (symbols[name] for name in ("batch", "sequence", "slots"))
    for node in list(graph.nodes):
        if node.target is not aten.slice.Tensor:
            continue
        table, dim, start, end, *step = (*node.args, *[None] * 4)[:5]
        starts_behind = sympy.simplify(_integer(start) - (slots - sequence)) == 0
        if not starts_behind or _integer(end) != slots or step[0] not in (None, 1):
            continue
        made = list(_made_of(node))
        if not _is_table(table) or dim == 0 or not all(_takes_batch(user, batch) for user in made):
            continue
        node.target, node.args = rows_at, (table, positions, dim)
        for each in [node, *(user for user in made if user.target in _UNARY)]:
            value = each.meta["val"]
            each.meta["val"] = replace(value, shape=(batch, *value.shape[1:]))


def most_slots(graph: fx.Graph, symbols: dict[str, sympy.Symbol]) -> int | None:
    """The size of the smallest table that is cut to the number of slots; None: there is none."""
    found = []
    for node in graph.nodes:
        if node.target is aten.slice.Tensor and "slots" in symbols:
            table, dim, _, end = (*node.args, *[None] * 3)[:4]
            size = table.meta["val"].shape[dim if dim is not None else 0]
            if _integer(end) == symbols["slots"] and isinstance(size, int):
                found.append(size)
    return min(found, default=None)


def _integer(value: Any) -> sympy.Expr:
    if isinstance(value, fx.Node):
        return sympy.sympify(value.meta["val"])
    return sympy.sympify(value if isinstance(value, int) else -1)


def _is_table(node: Any) -> bool:
    """A weight, or what is cut out of one, with room for a batch."""
    if not isinstance(node, fx.Node) or node.meta["val"].shape[0] != 1:
        return False
    while node.op == "call_function" and node.target in _UNARY:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _made_of(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield user
        if user.target in _UNARY:
            yield from _made_of(user)


def _takes_batch(user: fx.Node, batch: sympy.Symbol) -> bool:
    """Whether the op takes [B, ..] where it took [1, ..], and does with each row what it did with the one."""
    if user.target in _UNARY:
        return not (user.target is aten.slice.Tensor and user.args[1] == 0)
    value = user.meta.get("val")
    pointwise = isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags
    return bool(pointwise and isinstance(value, Value) and value.shape[0] == batch)
