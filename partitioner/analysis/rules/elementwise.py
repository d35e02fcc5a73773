"""Ops element by element, with broadcasting; those that fill a new tensor among them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from partitioner.analysis.rules.notation import Letters, Notation, Operand, Rules, is_tensor, letters, value_of
from partitioner.program.program import Value

aten = torch.ops.aten
RULES = Rules()


def aligned(source: fx.Node, target: Value) -> Letters:
    """Letters of an operand that is broadcast against `target`, aligned at the last dim."""
    shape, out = value_of(source).shape, target.shape
    offset = len(out) - len(shape)
    return tuple(None if size == 1 and out[offset + i] != 1 else str(offset + i) for i, size in enumerate(shape))


def elementwise(node: fx.Node, sources: Iterable[fx.Node]) -> Notation:
    out = value_of(node)
    operands = tuple(Operand(source, aligned(source, out)) for source in sources)
    return Notation(operands, (letters(len(out.shape)),))


def pointwise(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    if not isinstance(node.meta.get("val"), Value):
        return None
    return elementwise(node, [v for v in _flat(a.values()) if is_tensor(v)])


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


for _op in (
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.masked_fill,
    aten.where,
    aten.copy,
    aten.softplus,
    aten.nan_to_num,
    aten.relu6,
    aten.celu,
    aten.selu,
    aten.log_sigmoid,
    aten.isfinite,
    aten.square,
    aten.bernoulli,
    aten.complex,
    aten.polar,
):
    RULES[_op] = pointwise


@RULES.of(aten.add, aten.sub, aten.rsub, aten.subtract)
def _add(node: fx.Node, a: dict[str, Any]) -> Notation:
    sources = [v for v in (a["self"], a["other"]) if is_tensor(v)]
    found = elementwise(node, sources)
    # a number added to a partial sum would be added once per rank
    terms = tuple(frozenset((i,)) for i in range(len(sources))) if len(sources) == 2 else ()
    return Notation(found.operands, found.outputs, terms=terms)


@RULES.of(aten.mul, aten.multiply)
def _mul(node: fx.Node, a: dict[str, Any]) -> Notation:
    found = elementwise(node, [v for v in (a["self"], a["other"]) if is_tensor(v)])
    return Notation(found.operands, found.outputs, terms=(frozenset(range(len(found.operands))),))


@RULES.of(aten.div, aten.divide, aten.true_divide)
def _div(node: fx.Node, a: dict[str, Any]) -> Notation:
    found = elementwise(node, [v for v in (a["self"], a["other"]) if is_tensor(v)])
    if not is_tensor(a["self"]) or a.get("rounding_mode"):
        return found
    below = frozenset((1,)) if len(found.operands) == 2 else frozenset()
    return Notation(found.operands, found.outputs, terms=(frozenset(range(len(found.operands))),), denominators=below)


@RULES.of(aten.neg, aten.negative)
def _neg(node: fx.Node, a: dict[str, Any]) -> Notation:
    found = elementwise(node, [a["self"]])
    return Notation(found.operands, found.outputs, terms=(frozenset((0,)),))


@RULES.of(
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.zeros, aten.ones, aten.full, aten.empty,
    aten.arange, aten.scalar_tensor, aten.linspace, aten.eye, aten.new_empty_strided, aten.empty_strided,
)  # fmt: skip
def _creation(node: fx.Node, a: dict[str, Any]) -> Notation:
    return Notation((), (letters(len(value_of(node).shape), "out"),))
