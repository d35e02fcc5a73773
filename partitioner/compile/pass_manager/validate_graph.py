"""Whether a program can be read at all: what the check, emit and the engine take for granted of its graph."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from partitioner.program.program import PerRankInt, Program, Value

__all__ = ["fault"]


def fault(program: Program) -> str | None:
    """The first thing that is wrong, in words; None: the graph is one that may be checked."""
    try:
        program.graph.lint()
    except Exception as error:
        return f"torch.fx finds the graph broken: {error}"
    described = [given.name for given in program.inputs]
    taken = [node.target for node in program.graph.nodes if node.op == "placeholder"]
    if described != taken:
        return f"its graph takes the inputs {taken}, and program.inputs describes {described}, in this order"
    for node in program.graph.nodes:
        found = _fault(program, node)
        if found is not None:
            return f"node {node.name!r} {found}"
    if not any(node.op == "output" for node in program.graph.nodes):
        return "the graph has no output"
    return None


def _fault(program: Program, node: fx.Node) -> str | None:
    if node.op == "output":
        return None
    value = node.meta.get("val")
    if node.op == "placeholder":
        return None if isinstance(value, Value) else f"is an input without a value, got {value!r}"
    if node.op == "get_attr":
        known = str(node.target) in program.weights
        return None if known else f"reads the weight {node.target!r}, which program.weights does not describe"
    if node.op != "call_function":
        return f"is a {node.op}: calls are call_function, of an aten op or a function"
    absent: list[str] = []

    def see(leaf: Any) -> Any:
        if isinstance(leaf, PerRankInt) and leaf.name not in program.table:
            absent.append(leaf.name)
        return leaf

    fx.node.map_aggregate((node.args, node.kwargs), see)
    if absent:
        return f"names the integer {absent[0]!r}, of which program.table has no row"
    of = value if isinstance(value, (tuple, list)) else (value,)
    if not of or not all(isinstance(each, (Value, int, sympy.Expr)) for each in of):
        return f'has no value: set node.meta["val"] to Value(shape, dtype), got {value!r}'
    return None
