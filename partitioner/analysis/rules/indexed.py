"""Reading and writing at indices that are known only at run time."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from partitioner.analysis.rules.notation import Notation, Operand, Rules, is_tensor, letters, value_of

aten = torch.ops.aten
RULES = Rules()


@RULES.of(aten.index, aten._unsafe_index)
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
            Operand(
                indices[i],
                tuple(
                    None if s == 1 != out.shape[first + offset + j] else window[offset + j] for j, s in enumerate(shape)
                ),
            )
        )
    return Notation(tuple(operands), (names,), frozenset(f"w{i}" for i in places), terms=(frozenset((0,)),))


@RULES.of(aten.index_select)
def _index_select(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    dim = a["dim"] % len(names)
    x_letters = tuple("w" if i == dim else name for i, name in enumerate(names))
    operands = (Operand(a["self"], x_letters), Operand(a["index"], (names[dim],)))
    return Notation(operands, (names,), frozenset("w"), terms=(frozenset((0,)),))


@RULES.of(aten.gather)
def _gather(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    dim = a["dim"] % max(len(names), 1)
    x_shape, out_shape = value_of(a["self"]).shape, value_of(node).shape
    x_letters = tuple(f"w{i}" if i == dim or x_shape[i] != out_shape[i] else name for i, name in enumerate(names))
    operands = (Operand(a["self"], x_letters), Operand(a["index"], names))
    return Notation(operands, (names,), frozenset(x for x in x_letters if x[0] == "w"))


@RULES.of(aten.scatter, aten.scatter_add, aten.index_add, aten.index_copy, aten.index_fill, aten.scatter_reduce)
def _scatter(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    """Along `dim` everything may meet everything; the other dims run together where their sizes agree."""
    out = value_of(node)
    names = letters(len(out.shape))
    dim = a["dim"] % max(len(names), 1)
    whole = {names[dim]}
    operands = []
    for key in ("self", "index", "src", "source", "value"):
        operand = a.get(key)
        if not isinstance(operand, fx.Node) or not is_tensor(operand):
            continue
        shape = value_of(operand).shape
        if len(shape) == len(names):
            found = tuple(name if i == dim or shape[i] == out.shape[i] else f"{key}{i}" for i, name in enumerate(names))
            found = tuple(f"{key}{i}" if i == dim else name for i, name in enumerate(found))
        else:
            found = tuple(f"{key}{i}" for i in range(len(shape)))
        whole.update(x for x in found if x.startswith(key))
        operands.append(Operand(operand, found))
    return Notation(tuple(operands), (names,), frozenset(whole))


@RULES.of(aten.one_hot)
def _one_hot(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    return Notation((Operand(a["self"], names[:-1]),), (names,))
