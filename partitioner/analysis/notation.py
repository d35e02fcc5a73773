"""What an op computes, in index notation: the one table from which labels and layouts are both derived.

    linear      x[a b k] w[n k] bias[n] -> [a b n]        sums {k}
    softmax     x[a b c] -> [a b c]                       whole {c}
    attention   q[b h s d] k[b h' t d] v[b h' t e] -> [b h s e]    whole {s t d e}, h' = via[h]

Dims with the same letter run together. A *summed* letter is contracted linearly: split over ranks it leaves a partial sum.
A *whole* letter is needed entirely by each output element, or by the kernel. `terms` says in which operands the output is
linear: it is the sum over terms of the product of the term's operands, so partial sums may pass through them.
The notation is that of einsum and of GSPMD's dot dimension numbers (arXiv:2105.04663, section 3.2).

An op that is not in the table is opaque: it needs all of every operand, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from partitioner.analysis.arguments import arguments, node_values, operation
from partitioner.program import Local, Value

aten = torch.ops.aten
Letters = tuple[str | None, ...]

__all__ = ["RULES", "Letters", "Notation", "Operand", "is_opaque", "notation", "rule"]


@dataclass(frozen=True)
class Operand:
    """One tensor operand. `via`: for a letter, the operand's index that each index of the letter reads (grouped heads)."""

    node: fx.Node
    letters: Letters
    via: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Notation:
    """See the module's docstring. `denominators`: operands of a term in which it is not linear (division)."""

    operands: tuple[Operand, ...]
    outputs: tuple[Letters, ...]
    whole: frozenset[str] = frozenset()
    sums: frozenset[str] = frozenset()
    terms: tuple[frozenset[int], ...] = ()
    denominators: frozenset[int] = frozenset()
    averages: bool = False
    """Divides by the number of summed elements: in parts only as a sum and a division."""
    opaque: bool = False


Rule = Callable[[fx.Node, dict[str, Any]], Notation | None]
RULES: dict[Any, Rule] = {}


def rule(*ops: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
        return function

    return register


def value_of(node: Any) -> Value:
    value = node.meta["val"]
    assert isinstance(value, Value), (node, value)
    return value


def is_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), Value)


def letters(count: int, prefix: str = "") -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in range(count))


def opaque(node: fx.Node) -> Notation:
    """Needs all of every operand; what comes out depends on all of it."""
    operands, whole = [], set()
    for i, source in enumerate(node.all_input_nodes):
        if is_tensor(source):
            names = letters(len(value_of(source).shape), f"in{i}.")
            operands.append(Operand(source, names))
            whole.update(names)
    outputs = tuple(letters(len(v.shape), f"out{i}.") for i, v in enumerate(node_values(node)))
    return Notation(tuple(operands), outputs, frozenset(whole), opaque=True)


def is_opaque(node: fx.Node) -> bool:
    return notation(node).opaque


def notation(node: fx.Node) -> Notation:
    """The notation of a call_function node that is not a move."""
    function = RULES.get(operation(node))
    if function is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        function = _pointwise
    found = function(node, arguments(node)) if function else None
    return found or opaque(node)


# -- element by element ------------------------------------------------------------------------------------------------


def aligned(source: fx.Node, target: Value) -> Letters:
    """Letters of an operand that is broadcast against `target`, aligned at the last dim."""
    shape, out = value_of(source).shape, target.shape
    offset = len(out) - len(shape)
    return tuple(
        None if size == 1 and out[offset + i] != 1 else str(offset + i) for i, size in enumerate(shape)
    )


def elementwise(node: fx.Node, sources: Iterable[fx.Node]) -> Notation:
    out = value_of(node)
    operands = tuple(Operand(source, aligned(source, out)) for source in sources)
    return Notation(operands, (letters(len(out.shape)),))


def _pointwise(node: fx.Node, a: dict[str, Any]) -> Notation | None:
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
):
    RULES[_op] = _pointwise


@rule(aten.add, aten.sub, aten.rsub, aten.subtract)
def _add(node: fx.Node, a: dict[str, Any]) -> Notation:
    sources = [v for v in (a["self"], a["other"]) if is_tensor(v)]
    found = elementwise(node, sources)
    # a number added to a partial sum would be added once per rank
    terms = tuple(frozenset((i,)) for i in range(len(sources))) if len(sources) == 2 else ()
    return Notation(found.operands, found.outputs, terms=terms)


@rule(aten.mul, aten.multiply)
def _mul(node: fx.Node, a: dict[str, Any]) -> Notation:
    found = elementwise(node, [v for v in (a["self"], a["other"]) if is_tensor(v)])
    return Notation(found.operands, found.outputs, terms=(frozenset(range(len(found.operands))),))


@rule(aten.div, aten.divide, aten.true_divide)
def _div(node: fx.Node, a: dict[str, Any]) -> Notation:
    found = elementwise(node, [v for v in (a["self"], a["other"]) if is_tensor(v)])
    if not is_tensor(a["self"]) or a.get("rounding_mode"):
        return found
    below = frozenset((1,)) if len(found.operands) == 2 else frozenset()
    return Notation(found.operands, found.outputs, terms=(frozenset(range(len(found.operands))),), denominators=below)


@rule(aten.neg, aten.negative)
def _neg(node: fx.Node, a: dict[str, Any]) -> Notation:
    found = elementwise(node, [a["self"]])
    return Notation(found.operands, found.outputs, terms=(frozenset((0,)),))


@rule(
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.zeros, aten.ones, aten.full, aten.empty,
    aten.arange, aten.scalar_tensor, aten.linspace, aten.eye, aten.new_empty_strided, aten.empty_strided,
)  # fmt: skip
def _creation(node: fx.Node, a: dict[str, Any]) -> Notation:
    return Notation((), (letters(len(value_of(node).shape), "out"),))


# -- along dims --------------------------------------------------------------------------------------------------------


def along(node: fx.Node, dims: Iterable[int], source: fx.Node | None = None) -> Notation:
    """Same shape out as in (or another size along `dims`), where each element needs all of `dims`."""
    source = source or node.all_input_nodes[0]
    rank = len(value_of(source).shape)
    names = letters(rank)
    return Notation(
        (Operand(source, names),), (names,) * len(node_values(node)), frozenset(names[dim % rank] for dim in dims)
    )


@rule(aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.cumsum, aten.cumprod, aten.logcumsumexp,
      aten.topk, aten.sort, aten.argsort, aten.cummax, aten.cummin, aten.glu)  # fmt: skip
def _along(node: fx.Node, a: dict[str, Any]) -> Notation:
    default = 0 if operation(node) is aten.cumsum else -1
    dim = a["dim"] if isinstance(a.get("dim"), int) else default
    return along(node, [dim], a["self"])


@rule(aten.tril, aten.triu)
def _triangle(node: fx.Node, a: dict[str, Any]) -> Notation:
    return along(node, [-2, -1], a["self"])


def reduction(node: fx.Node, a: dict[str, Any], *, linear: bool) -> Notation | None:
    source = a["self"]
    rank = len(value_of(source).shape)
    dims = a.get("dim")
    if dims is None or dims == []:
        dims = list(range(rank))
    if isinstance(dims, int):
        dims = [dims]
    reduced = {dim % max(rank, 1) for dim in dims}
    names = letters(rank)
    kept: Letters = tuple(
        None if i in reduced else name for i, name in enumerate(names) if a.get("keepdim") or i not in reduced
    )
    over = frozenset(names[i] for i in reduced)
    return Notation(
        (Operand(source, names),),
        (kept,) * len(node_values(node)),
        whole=frozenset() if linear else over,
        sums=over if linear else frozenset(),
        terms=(frozenset((0,)),) if linear else (),
        averages=operation(node) is aten.mean,
    )


@rule(aten.sum, aten.mean)
def _sum(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    return reduction(node, a, linear=True)


@rule(aten.amax, aten.amin, aten.max, aten.min, aten.prod, aten.var, aten.std, aten.any, aten.all, aten.logsumexp,
      aten.argmax, aten.argmin, aten.linalg_vector_norm, aten.norm)  # fmt: skip
def _reduction(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    if is_tensor(a.get("other")):  # the element-wise overload of max and min
        return _pointwise(node, a)
    if a.get("correction") is None and a.get("unbiased") is not None and not isinstance(a.get("dim"), (int, list)):
        return None
    return reduction(node, a, linear=False)


@rule(aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm)
def _norm(node: fx.Node, a: dict[str, Any]) -> Notation:
    source = a["input"]
    rank, over = len(value_of(source).shape), len(a["normalized_shape"])
    names = letters(rank)
    operands = [Operand(source, names)]
    operands += [Operand(a[k], names[rank - over :]) for k in ("weight", "bias") if is_tensor(a.get(k))]
    statistics: Letters = names[: rank - over] + (None,) * over
    outputs = (names,) + (statistics,) * (len(node_values(node)) - 1)
    return Notation(tuple(operands), outputs, frozenset(names[rank - over :]))


@rule(aten.group_norm)
def _group_norm(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(a["input"]).shape))
    operands = [Operand(a["input"], names)]
    operands += [Operand(a[k], names[1:2]) for k in ("weight", "bias") if is_tensor(a.get(k))]
    return Notation(tuple(operands), (names,), frozenset(names[1:]))


@rule(aten.view_as_complex)
def _view_as_complex(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    return Notation((Operand(a["self"], (*names, "w")),), (names,), frozenset("w"))


@rule(aten.view_as_real)
def _view_as_real(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    return Notation((Operand(a["self"], names[:-1]),), (names,))


# -- contractions ------------------------------------------------------------------------------------------------------


@rule(aten.linear)
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
            Operand(extra, tuple(None if s == 1 != out.shape[offset + i] else names[offset + i] for i, s in enumerate(shape)))
        )
        terms.append(frozenset((2,)))
    return Notation(tuple(operands), (names,), sums=frozenset("k"), terms=tuple(terms))


@rule(aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot)
def _matmul(node: fx.Node, a: dict[str, Any]) -> Notation:
    first, second = (v for v in a.values() if is_tensor(v))
    return matmul(first, second, None, value_of(node))


@rule(aten.addmm, aten.baddbmm)
def _addmm(node: fx.Node, a: dict[str, Any]) -> Notation:
    extra, first, second = (v for v in a.values() if is_tensor(v))
    return matmul(first, second, extra if a.get("beta", 1) != 0 else None, value_of(node))


@rule(aten.einsum)
def _einsum(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    equation = a["equation"].replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    inputs, output = equation.split("->")
    operands = tuple(Operand(x, tuple(names)) for x, names in zip(a["tensors"], inputs.split(","), strict=True))
    sums = frozenset(inputs) - frozenset(output) - {","}
    return Notation(operands, (tuple(output),), sums=sums, terms=(frozenset(range(len(operands))),))


@rule(aten.outer)
def _outer(node: fx.Node, a: dict[str, Any]) -> Notation:
    operands = (Operand(a["self"], ("m",)), Operand(a["vec2"], ("n",)))
    return Notation(operands, (("m", "n"),), terms=(frozenset((0, 1)),))


@rule(aten.conv1d, aten.convolution, aten.conv2d)
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
    elif isinstance(a["groups"], Local) or a["groups"] == channels == value_of(x).shape[1]:
        operands = [Operand(x, ("b", "c", *space)), Operand(weight, ("c", None, *window))]
        sums = frozenset()
    else:
        return None
    terms = [frozenset((0, 1))]
    if is_tensor(a.get("bias")):
        operands.append(Operand(a["bias"], ("c",)))
        terms.append(frozenset((2,)))
    return Notation(tuple(operands), (("b", "c", *space),), whole, sums, tuple(terms))


@rule(aten.embedding)
def _embedding(node: fx.Node, a: dict[str, Any]) -> Notation:
    lead = letters(len(value_of(a["indices"]).shape))
    operands = (Operand(a["indices"], lead), Operand(a["weight"], ("v", "h")))
    return Notation(operands, ((*lead, "h"),), sums=frozenset("v"), terms=(frozenset((1,)),))


def grouped_attention(q: fx.Node, k: fx.Node, v: fx.Node, extras: list[Operand], kv_map: Any = None) -> Notation:
    """q[b h s d] k[b g t d] v[b g t e] -> [b h s e]: query head h reads kv head via[h]."""
    heads, kv_heads = value_of(q).shape[1], value_of(k).shape[1]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
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
        tuple(None if size == 1 and name != "t" and full[i] != 1 else name for i, (size, name) in enumerate(zip(shape, names, strict=True))),
    )


@rule(aten.scaled_dot_product_attention)
def _sdpa(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    shapes = [value_of(a[name]).shape for name in ("query", "key", "value")]
    if any(len(shape) != 4 or not isinstance(shape[1], int) for shape in shapes):
        return None
    extras = [mask_operand(a["attn_mask"], value_of(node))] if is_tensor(a.get("attn_mask")) else []
    return grouped_attention(a["query"], a["key"], a["value"], extras)


# -- indexed -----------------------------------------------------------------------------------------------------------


@rule(aten.index, aten._unsafe_index)
def _index(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    source, indices = a["self"], list(a["indices"])
    rank = len(value_of(source).shape)
    indices += [None] * (rank - len(indices))
    places = [i for i, index in enumerate(indices) if index is not None]
    if any(value_of(indices[i]).dtype in (torch.bool, torch.uint8) for i in places):
        return None
    out = value_of(node)
    width = len(out.shape) - (rank - len(places))
    first = places[0] if places[-1] - places[0] + 1 == len(places) else 0
    kept = [i for i in range(rank) if i not in places]
    names = letters(len(out.shape))
    window = names[first : first + width]
    others = iter((*names[:first], *names[first + width :]))
    by_dim = {i: next(others) for i in kept}
    x_letters = tuple(by_dim.get(i, f"w{i}") for i in range(rank))
    operands = [Operand(source, x_letters)]
    for i in places:
        shape = value_of(indices[i]).shape
        offset = width - len(shape)
        operands.append(
            Operand(indices[i], tuple(None if s == 1 != out.shape[first + offset + j] else window[offset + j] for j, s in enumerate(shape)))
        )
    return Notation(tuple(operands), (names,), frozenset(f"w{i}" for i in places), terms=(frozenset((0,)),))


@rule(aten.index_select)
def _index_select(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    dim = a["dim"] % len(names)
    x_letters = tuple("w" if i == dim else name for i, name in enumerate(names))
    operands = (Operand(a["self"], x_letters), Operand(a["index"], (names[dim],)))
    return Notation(operands, (names,), frozenset("w"), terms=(frozenset((0,)),))


@rule(aten.gather)
def _gather(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    dim = a["dim"] % max(len(names), 1)
    x_shape, out_shape = value_of(a["self"]).shape, value_of(node).shape
    x_letters = tuple(
        f"w{i}" if i == dim or x_shape[i] != out_shape[i] else name for i, name in enumerate(names)
    )
    operands = (Operand(a["self"], x_letters), Operand(a["index"], names))
    return Notation(operands, (names,), frozenset(x for x in x_letters if x[0] == "w"))


@rule(aten.scatter, aten.scatter_add, aten.index_add, aten.index_copy, aten.index_fill, aten.scatter_reduce)
def _scatter(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    """Along `dim` everything may meet everything; the other dims run together where their sizes agree."""
    out = value_of(node)
    names = letters(len(out.shape))
    dim = a["dim"] % max(len(names), 1)
    whole = {names[dim]}
    operands = []
    for key in ("self", "index", "src", "source", "value"):
        operand = a.get(key)
        if not is_tensor(operand):
            continue
        shape = value_of(operand).shape
        if len(shape) == len(names):
            found = tuple(
                name if i == dim or shape[i] == out.shape[i] else f"{key}{i}" for i, name in enumerate(names)
            )
            found = tuple(f"{key}{i}" if i == dim else name for i, name in enumerate(found))
        else:
            found = tuple(f"{key}{i}" for i in range(len(shape)))
        whole.update(x for x in found if x.startswith(key))
        operands.append(Operand(operand, found))
    return Notation(tuple(operands), (names,), frozenset(whole))


@rule(aten.one_hot)
def _one_hot(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    return Notation((Operand(a["self"], names[:-1]),), (names,))


