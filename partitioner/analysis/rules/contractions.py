"""Matrix products in all their spellings, convolutions, look-up tables, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from partitioner.analysis.rules.notation import Letters, Notation, Operand, Rules, is_tensor, letters, value_of
from partitioner.program.program import PerRankInt, Value

aten = torch.ops.aten
RULES = Rules()


@RULES.of(aten.linear)
def _linear(node: fx.Node, a: dict[str, Any]) -> Notation:
    rank = len(value_of(a["input"]).shape)
    lead = letters(rank - 1)
    operands = [Operand(a["input"], (*lead, "k")), Operand(a["weight"], ("n", "k"))]
    terms = [frozenset((0, 1))]
    if is_tensor(a.get("bias")):
        operands.append(Operand(a["bias"], ("n",)))
        terms.append(frozenset((2,)))
    return Notation(tuple(operands), ((*lead, "n"),), sums=frozenset("k"), terms=tuple(terms))


def matmul(x: fx.Node, y: fx.Node, extra: fx.Node | None, out: Value) -> Notation:
    """x[.. m k] @ y[.. k n] (+ extra), batch dims broadcast; vectors as torch.matmul has them."""
    x_shape, y_shape = value_of(x).shape, value_of(y).shape
    m = () if len(x_shape) == 1 else ("m",)
    n = () if len(y_shape) == 1 else ("n",)
    batch = out.shape[: len(out.shape) - len(m) - len(n)]

    def lead(shape: tuple[Any, ...]) -> Letters:
        count = max(len(shape) - 2, 0)
        offset = len(batch) - count
        return tuple(None if shape[i] == 1 and batch[offset + i] != 1 else f"b{offset + i}" for i in range(count))

    operands = [Operand(x, (*lead(x_shape), *m, "k")), Operand(y, (*lead(y_shape), "k", *n))]
    names = (*(f"b{i}" for i in range(len(batch))), *m, *n)
    terms = [frozenset((0, 1))]
    if extra is not None:
        shape = value_of(extra).shape
        offset = len(names) - len(shape)
        operands.append(
            Operand(
                extra,
                tuple(None if s == 1 != out.shape[offset + i] else names[offset + i] for i, s in enumerate(shape)),
            )
        )
        terms.append(frozenset((2,)))
    return Notation(tuple(operands), (names,), sums=frozenset("k"), terms=tuple(terms))


@RULES.of(aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot)
def _matmul(node: fx.Node, a: dict[str, Any]) -> Notation:
    first, second = (v for v in a.values() if is_tensor(v))
    return matmul(first, second, None, value_of(node))


@RULES.of(aten.addmm, aten.baddbmm)
def _addmm(node: fx.Node, a: dict[str, Any]) -> Notation:
    extra, first, second = (v for v in a.values() if is_tensor(v))
    return matmul(first, second, extra, value_of(node))


@RULES.of(aten.einsum)
def _einsum(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    equation = a["equation"].replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    inputs, output = equation.split("->")
    operands = tuple(Operand(x, tuple(names)) for x, names in zip(a["tensors"], inputs.split(","), strict=True))
    sums = frozenset(inputs) - frozenset(output) - {","}
    return Notation(operands, (tuple(output),), sums=sums, terms=(frozenset(range(len(operands))),))


@RULES.of(aten.outer)
def _outer(node: fx.Node, a: dict[str, Any]) -> Notation:
    operands = (Operand(a["self"], ("m",)), Operand(a["vec2"], ("n",)))
    return Notation(operands, (("m", "n"),), terms=(frozenset((0, 1)),))


@RULES.of(aten.conv1d, aten.convolution, aten.conv2d)
def _convolution(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    x, weight = a["input"], a["weight"]
    channels = value_of(weight).shape[0]
    if a.get("transposed") or len(value_of(x).shape) != len(value_of(weight).shape):
        return None
    space = letters(len(value_of(x).shape) - 2, "l")
    window = letters(len(space), "w")
    whole = frozenset((*space, *window))
    if a["groups"] == 1:
        operands = [Operand(x, ("b", "k", *space)), Operand(weight, ("c", "k", *window))]
        sums = frozenset("k")
    elif isinstance(a["groups"], PerRankInt) or a["groups"] == channels == value_of(x).shape[1]:
        operands = [Operand(x, ("b", "c", *space)), Operand(weight, ("c", None, *window))]
        sums = frozenset()
    else:
        return None
    terms = [frozenset((0, 1))]
    if is_tensor(a.get("bias")):
        operands.append(Operand(a["bias"], ("c",)))
        terms.append(frozenset((2,)))
    return Notation(tuple(operands), (("b", "c", *space),), whole, sums, tuple(terms))


@RULES.of(aten.embedding)
def _embedding(node: fx.Node, a: dict[str, Any]) -> Notation:
    lead = letters(len(value_of(a["indices"]).shape))
    operands = (Operand(a["indices"], lead), Operand(a["weight"], ("v", "h")))
    return Notation(operands, ((*lead, "h"),), sums=frozenset("v"), terms=(frozenset((1,)),))


def grouped_attention(q: fx.Node, k: fx.Node, v: fx.Node, extras: list[Operand], kv_map: Any = None) -> Notation | None:
    """q[b h s d] k[b g t d] v[b g t e] -> [b h s e]: query head h reads kv head via[h].

    None where the number of heads follows from the inputs, as where a model folds its tokens into them.
    """
    if any(len(value_of(each).shape) != 4 for each in (q, k, v)):
        return None
    heads, kv_heads = value_of(q).shape[1], value_of(k).shape[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        return None
    via = tuple(kv_map) if kv_map is not None else tuple(h * kv_heads // heads for h in range(heads))
    grouped = (("h", via),) if heads != kv_heads or kv_map is not None else ()
    operands = (
        Operand(q, ("b", "h", "s", "d")),
        Operand(k, ("b", "h", "t", "d"), grouped),
        Operand(v, ("b", "h", "t", "e"), grouped),
        *extras,
    )
    return Notation(operands, (("b", "h", "s", "e"),), frozenset("stde"))


def mask_operand(mask: fx.Node, out: Value) -> Operand:
    """An additive mask or bias broadcast to [b h s t]."""
    shape = value_of(mask).shape
    names = ("b", "h", "s", "t")[4 - len(shape) :]
    full = (*out.shape[:3], None)[4 - len(shape) :]
    return Operand(
        mask,
        tuple(
            None if size == 1 and name != "t" and full[i] != 1 else name
            for i, (size, name) in enumerate(zip(shape, names, strict=True))
        ),
    )


@RULES.of(aten.scaled_dot_product_attention)
def _sdpa(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    extras = [mask_operand(a["attn_mask"], value_of(node))] if is_tensor(a.get("attn_mask")) else []
    return grouped_attention(a["query"], a["key"], a["value"], extras)
