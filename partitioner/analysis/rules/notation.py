"""What an op computes, in index notation: labels and layouts are both derived from it (the table is `rules`).

    linear      x[a b k] w[n k] bias[n] -> [a b n]        sums {k}
    softmax     x[a b c] -> [a b c]                       whole {c}
    attention   q[b h s d] k[b h' t d] v[b h' t e] -> [b h s e]    whole {s t d e}, h' = via[h]

Dims with the same letter run together. A *summed* letter is contracted linearly: split over ranks it leaves a partial
sum. A *whole* letter is needed entirely by each output element, or by the kernel. `terms` says in which operands the
output is linear: it is the sum over terms of the product of the term's operands, so partial sums may pass through
them. The notation is that of einsum and of GSPMD's dot dimension numbers (arXiv:2105.04663, section 3.2).

An op that is not in the table is opaque: it needs all of every operand, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from partitioner.program.node_arguments import node_values
from partitioner.program.program import Value

Letters = tuple[str | None, ...]

__all__ = ["Letters", "Notation", "Operand", "Rules", "is_tensor", "letters", "opaque", "value_of"]


@dataclass(frozen=True)
class Operand:
    """One tensor operand. `via`: for a letter, the operand's index that each index of the letter reads (grouped
    heads).
    """

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
    in_parts: frozenset[str] = frozenset()
    """Whole letters that sums over them would do for, once the op is decomposed (a norm's): see `decompose_norms`."""
    opaque: bool = False


Rule = Callable[[fx.Node, dict[str, Any]], Notation | None]


class Rules(dict[Any, Rule]):
    """Rules by op. A rule gets a node and its arguments by name, and answers None where it does not apply."""

    def of(self, *ops: Any) -> Callable[[Rule], Rule]:
        """Decorator: the function is the rule of these ops."""

        def register(function: Rule) -> Rule:
            self.update(dict.fromkeys(ops, function))
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
    operands: list[Operand] = []
    whole: set[str] = set()
    for i, source in enumerate(node.all_input_nodes):
        if is_tensor(source):
            names = letters(len(value_of(source).shape), f"in{i}.")
            operands.append(Operand(source, names))
            whole.update(names)
    outputs = tuple(letters(len(v.shape), f"out{i}.") for i, v in enumerate(node_values(node)))
    return Notation(tuple(operands), outputs, frozenset(whole), opaque=True)
