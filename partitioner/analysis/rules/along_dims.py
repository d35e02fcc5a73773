"""Ops along dims: softmax, reductions, norms. Each element needs all of those dims."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from partitioner.analysis.rules.decompose_norms import can_decompose
from partitioner.analysis.rules.elementwise import pointwise
from partitioner.analysis.rules.notation import Letters, Notation, Operand, Rules, is_tensor, letters, value_of
from partitioner.program.node_arguments import node_values, operation

aten = torch.ops.aten
RULES = Rules()


def along(node: fx.Node, dims: Iterable[int], source: fx.Node | None = None) -> Notation:
    """Same shape out as in (or another size along `dims`), where each element needs all of `dims`."""
    source = source or node.all_input_nodes[0]
    rank = len(value_of(source).shape)
    names = letters(rank)
    return Notation(
        (Operand(source, names),), (names,) * len(node_values(node)), frozenset(names[dim % rank] for dim in dims)
    )


@RULES.of(
    aten.softmax, aten._softmax, aten.log_softmax, aten._log_softmax, aten.cumsum, aten.cumprod, aten.logcumsumexp,
    aten.topk, aten.sort, aten.argsort, aten.cummax, aten.cummin, aten.glu,
)  # fmt: skip
def _along(node: fx.Node, a: dict[str, Any]) -> Notation:
    default = 0 if operation(node) is aten.cumsum else -1
    dim = a["dim"] if isinstance(a.get("dim"), int) else default
    return along(node, [dim], a["self"])


@RULES.of(aten.tril, aten.triu)
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
    in_parts = over if len(over) == 1 and can_decompose(node) else frozenset[str]()
    return Notation(
        (Operand(source, names),),
        (kept,) * len(node_values(node)),
        whole=frozenset() if linear else over,
        sums=over if linear else frozenset(),
        terms=(frozenset((0,)),) if linear else (),
        averages=operation(node) is aten.mean,
        in_parts=in_parts,
    )


@RULES.of(aten.sum, aten.mean)
def _sum(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    return reduction(node, a, linear=True)


@RULES.of(aten.amax, aten.amin, aten.max, aten.min, aten.prod, aten.var, aten.std, aten.any, aten.all, aten.logsumexp,
      aten.argmax, aten.argmin, aten.linalg_vector_norm, aten.norm)  # fmt: skip
def _reduction(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    if is_tensor(a.get("other")):  # the element-wise overload of max and min
        return pointwise(node, a)
    if a.get("correction") is None and a.get("unbiased") is not None and not isinstance(a.get("dim"), (int, list)):
        return None
    return reduction(node, a, linear=False)


@RULES.of(aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm)
def _norm(node: fx.Node, a: dict[str, Any]) -> Notation:
    source = a["input"]
    rank, over = len(value_of(source).shape), len(a["normalized_shape"])
    names = letters(rank)
    operands = [Operand(source, names)]
    operands += [Operand(a[k], names[rank - over :]) for k in ("weight", "bias") if is_tensor(a.get(k))]
    statistics: Letters = names[: rank - over] + (None,) * over
    outputs = (names,) + (statistics,) * (len(node_values(node)) - 1)
    over_letters = frozenset(names[rank - over :])
    written_out = over == 1 and can_decompose(node)
    return Notation(tuple(operands), outputs, over_letters, in_parts=over_letters if written_out else frozenset())


@RULES.of(aten.group_norm)
def _group_norm(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(a["input"]).shape))
    operands = [Operand(a["input"], names)]
    operands += [Operand(a[k], names[1:2]) for k in ("weight", "bias") if is_tensor(a.get(k))]
    return Notation(tuple(operands), (names,), frozenset(names[1:]))


@RULES.of(aten.view_as_complex)
def _view_as_complex(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    return Notation((Operand(a["self"], (*names, "w")),), (names,), frozenset("w"))


@RULES.of(aten.view_as_real)
def _view_as_real(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    return Notation((Operand(a["self"], names[:-1]),), (names,))
