"""Whether two traces of one model are the same program: nodes, weights and constants, whatever nodes are called."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from partitioner.program.program import Program

__all__ = ["difference"]


def difference(one: Program, other: Program) -> str | None:
    """The first thing in which they differ; None: they are the same."""
    lines, others = _lines(one), _lines(other)
    for line, twin in zip(lines, others, strict=False):
        if line != twin:
            return f"{line} != {twin}"
    if len(lines) != len(others):
        return f"{len(lines)} lines, {len(others)} lines"
    for about in ("inputs", "symbols", "limits", "states", "notes", "has_head"):
        if getattr(one, about) != getattr(other, about):
            return f"{about}: {getattr(one, about)} != {getattr(other, about)}"
    weights, twins = ([w for w in program.weights.values() if w.source != "constant"] for program in (one, other))
    if weights != twins:
        return f"weights: {sorted({w.name for w in weights} ^ {w.name for w in twins}) or 'in another order'}"
    for weight in weights:
        data, twin_data = one.weight_data[weight.name], other.weight_data[weight.name]
        if not data.is_meta and not torch.equal(data, twin_data):
            return f"data of {weight.name}"
    return None


def _lines(program: Program) -> list[Any]:
    """One per op. A constant is what it holds: layers that were traced once have one where others have many."""
    ops = [node for node in program.graph.nodes if node.op != "get_attr"]
    names: dict[fx.Node, Any] = {node: f"%{number}" for number, node in enumerate(ops)}
    names |= {n: _weight(program, str(n.target)) for n in program.graph.nodes if n.op == "get_attr"}
    found = []
    for node in ops:
        args = fx.node.map_arg((node.args, tuple(sorted(node.kwargs.items()))), names.__getitem__)
        about = str(node.meta.get("val")), node.meta.get("path"), node.meta.get("source")
        found.append((node.op, str(node.target), repr(args), *about))
    return found


def _weight(program: Program, name: str) -> Any:
    if program.weights[name].source != "constant":
        return name
    data = program.weight_data[name]
    return str(data.dtype), tuple(data.shape), data.tolist()
