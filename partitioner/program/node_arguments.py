"""Reading a node: its arguments by name, and its shapes and integers at given values of the batch and sequence
symbols.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import sympy
import torch
from torch import fx

from partitioner.program.program import Value

__all__ = [
    "arguments",
    "describe",
    "evaluate",
    "layer_of",
    "map_nodes",
    "node_values",
    "operation",
    "shape_at",
    "symbols_of",
]

Symbols = Mapping[sympy.Symbol, int]


def operation(node: fx.Node) -> Any:
    """What a call_function node calls, without the overload: the key of the rule tables."""
    target = node.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def describe(node: fx.Node) -> str:
    """The op and where it is, for reports: "softmax in model.layers.0.self_attn"."""
    op = operation(node)
    return f"{getattr(op, '__name__', op)} in {node.meta.get('path') or node.name}"


def layer_of(path: str) -> str:
    """The path up to the first number: "model.layers.0" of "model.layers.0.mlp"; "" outside layers."""
    found = re.match(r"^((?:[^.]+\.)*?\d+)(?:\.|$)", path)
    return found.group(1) if found else ""


@cache
def _parameters(target: Any) -> tuple[tuple[str, Any], ...]:
    if isinstance(target, torch._ops.OpOverload):
        return tuple((a.name, a.default_value if a.has_default_value() else None) for a in target._schema.arguments)
    try:
        signature = inspect.signature(target)
    except ValueError:  # builtins of the operator module: positional arguments only
        return (("a", None), ("b", None))
    return tuple((p.name, None if p.default is p.empty else p.default) for p in signature.parameters.values())


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by parameter name, defaults filled in."""
    assert callable(node.target)
    parameters = _parameters(node.target)
    found = dict(parameters)
    for (name, _), value in zip(parameters, node.args, strict=False):
        found[name] = value
    found.update(node.kwargs)
    return found


def node_values(node: fx.Node) -> tuple[Value, ...]:
    """The tensors a node yields: one for most, several for split and its like, none for integers."""
    value = node.meta.get("val")
    if isinstance(value, Value):
        return (value,)
    if isinstance(value, (tuple, list)):
        return tuple(v for v in value if isinstance(v, Value))
    return ()


_cache: dict[tuple[Any, tuple[tuple[sympy.Symbol, int], ...]], int] = {}


def evaluate(expression: int | sympy.Expr, symbols: Symbols) -> int:
    """An integer expression at the given values of the symbols; sizes that depend on data count as 1."""
    if isinstance(expression, int):
        return expression
    key = (expression, tuple(symbols.items()))
    if key not in _cache:
        others = {symbol: 1 for symbol in expression.free_symbols if symbol not in symbols}
        _cache[key] = int(expression.subs({**symbols, **others}))
    return _cache[key]


def symbols_of(size: Any) -> frozenset[sympy.Symbol]:
    """The symbols in a size, or in anything else that a node may yield: none in an integer."""
    return frozenset(size.free_symbols) if isinstance(size, sympy.Basic) else frozenset()


def shape_at(value: Value, symbols: Symbols) -> tuple[int, ...]:
    return tuple(evaluate(size, symbols) for size in value.shape)


def map_nodes(value: Any, function: Callable[[fx.Node], Any]) -> Any:
    """`value` (an argument, possibly nested) with every node replaced."""
    return fx.node.map_arg(value, function)
