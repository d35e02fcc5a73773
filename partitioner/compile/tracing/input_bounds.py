"""Which values the inputs may have, read off the graph: those that exist in the tables they look up.

    embedding(table[V, H], input_ids)            input_ids from 0 to V-1
    embedding(table[N, H], position_ids + 2)     position_ids from -2 to N-3
    embedding(table[N, H], arange(S) + 2)        S up to N-2

Without this a value outside is an IndexError on one rank, and on several, each of which looks up the rows that it has,
a row of zeros. Followed are views of a whole input, casts, and sums with a constant; and what grows with the sequence:
aranges, and running counts (of tokens that are no padding, say, for which the bound takes every token to count).
What has been through any other op is not known, and not bounded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from partitioner.program.node_arguments import arguments, operation
from partitioner.program.program import Program, Value
from runtime.program.rank_program import Bound

aten = torch.ops.aten

__all__ = ["bound_inputs"]

_SAME_VALUES = {
    aten.alias,
    aten.clone,
    aten.expand,
    aten.flatten,
    aten.permute,
    aten.reshape,
    aten.squeeze,
    aten.transpose,
    aten.unsqueeze,
    aten.view,
}
"""Ops whose result holds all elements of their first argument and no others."""
_CASTS = {aten.to, aten.type_as, aten._to_copy}
_INDICES = {torch.int32, torch.int64}


@dataclass(frozen=True)
class _Known:
    """The values of a node: those of `source` (an input) plus `low`; or, without a source, from `low` to `high`."""

    source: str
    low: sympy.Expr
    high: sympy.Expr


def bound_inputs(program: Program) -> None:
    """Sets `bound` on the inputs, and tightens `limits` where what grows with the sequence meets the end of a table."""
    known: dict[fx.Node, _Known] = {}
    bounds: dict[str, Bound] = {}
    limits = dict(program.limits)
    sequence = program.symbols.get("sequence")
    for node in program.graph.nodes:
        if node.op == "placeholder":
            known[node] = _Known(str(node.target), sympy.Integer(0), sympy.Integer(0))
        if node.op != "call_function":
            continue
        found = _follow(node, known)
        if found is not None:
            known[node] = found
        for table, dim, index, from_end in _lookups(node):
            rows = table.meta["val"].shape[dim]
            at = known.get(index)
            if at is None or not isinstance(rows, int) or index.meta["val"].dtype not in _INDICES:
                continue
            low = -rows if from_end else 0
            if at.source:
                name = str(table.target) if table.op == "get_attr" else table.name
                bound = Bound(low - int(at.low), rows - 1 - int(at.low), rows, name)
                bounds[at.source] = _both(bounds.get(at.source), bound)
            elif sequence is not None and (at.high - sequence).is_Integer:
                least, most = limits.get("sequence", (1, None))
                longest = rows - 1 - int(at.high - sequence)
                limits["sequence"] = (least, longest if most is None else min(most, longest))
    program.inputs = tuple(replace(given, bound=bounds.get(given.name)) for given in program.inputs)
    if limits.get("sequence") != program.limits.get("sequence"):
        program.notes = [*program.notes, f"sequence up to {limits['sequence'][1]}: the rows of its table of positions"]
    program.limits = limits


def _follow(node: fx.Node, known: dict[fx.Node, _Known]) -> _Known | None:
    """What is known of the values of `node` from those of its operands."""
    value, op = node.meta.get("val"), operation(node)
    if not isinstance(value, Value):
        return None
    if value.dtype is torch.bool:
        return _Known("", sympy.Integer(0), sympy.Integer(1))
    a = arguments(node)
    if op is aten.arange and value.dtype in _INDICES and a.get("step") in (None, 1):
        start = _size(a.get("start") or 0)
        return None if start is None else _Known("", start, start + value.shape[0] - 1)
    given = known.get(a.get("self"))  # type: ignore[arg-type]
    if given is None:
        return None
    if op in _SAME_VALUES or (op in _CASTS and value.dtype in _INDICES):
        return given
    if op in (aten.add, aten.sub) and a["alpha"] == 1 and value.dtype in _INDICES:
        term = a["other"]
        if type(term) is int:
            shift = term if op is aten.add else -term
            return replace(given, low=given.low + shift, high=given.high + shift)
    if given.source or given.low != 0:
        return None
    if op is aten.cumsum and given.high == 1:
        return replace(given, high=sympy.sympify(value.shape[a["dim"]]))
    if op is aten.mul:
        other = known.get(a["other"]) if isinstance(a["other"], fx.Node) else None
        if other is not None and not other.source and other.low == 0:
            return replace(given, high=given.high * other.high)
    return None


def _size(value: Any) -> sympy.Expr | None:
    if isinstance(value, int):
        return sympy.Integer(value)
    size = value.meta.get("val") if isinstance(value, fx.Node) else None
    return sympy.sympify(size) if isinstance(size, (int, sympy.Expr)) else None


def _lookups(node: fx.Node) -> list[tuple[fx.Node, int, fx.Node, bool]]:
    """The table, its dim, the indices, and whether negative ones count from the end."""
    op = operation(node)
    if op not in (aten.embedding, aten.index, aten.index_select):
        return []
    a = arguments(node)
    if op is aten.embedding:
        return [(a["weight"], 0, a["indices"], False)]
    if op is aten.index:
        return [(a["self"], dim, index, True) for dim, index in enumerate(a["indices"]) if index is not None]
    return [(a["self"], a["dim"], a["index"], False)]


def _both(one: Bound | None, other: Bound) -> Bound:
    """Where an input is looked up in several tables, the smallest decides."""
    if one is None:
        return other
    smaller = min(one, other, key=lambda bound: bound.high)
    return replace(smaller, low=max(one.low, other.low))
