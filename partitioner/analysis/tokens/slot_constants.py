"""Values made from sizes and weights alone, for two numbers of slots.

A distance for ALiBi (arXiv:2108.12409), a table cut to the length of the cache, a mask of zeros: whatever becomes of
such a value must not depend on how many slots a cache has. So it is made for few slots and for many, and must be the
same for the slots that both have; or differ by one number throughout where all that happens is a softmax over them,
which does not notice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from partitioner.analysis.rules.data_movement import IDENTITIES
from partitioner.program.node_arguments import arguments, evaluate, map_nodes, node_values, operation, symbols_of
from partitioner.program.program import Program
from runtime.ops.attention import attention
from runtime.ops.state import cache_append, position_mask

aten = torch.ops.aten

__all__ = ["MadeOfSizes", "counts", "has_slots"]

_BATCH, _SEQUENCE = 2, 3
_FEW, _MANY = 7, 11
_LARGEST = 1 << 22


def counts(slots: sympy.Symbol, size: Any) -> bool:
    """Whether a size depends on the number of slots."""
    return slots in symbols_of(size)


def has_slots(slots: sympy.Symbol, node: fx.Node) -> bool:
    return any(counts(slots, size) for value in node_values(node) for size in value.shape)


class MadeOfSizes:
    """The values of a program that depend on nothing else."""

    def __init__(self, program: Program) -> None:
        self.program, self.slots = program, program.symbols["slots"]
        self.checked: dict[fx.Node, str | None] = {}
        self.made: tuple[dict[fx.Node, Any], dict[fx.Node, Any]] = ({}, {})

    def problem(self, source: fx.Node, user: fx.Node) -> str | None:
        """Why `user` may not read `source`, which depends on sizes and weights only; None: it may."""
        if source in self.checked:
            return self.checked[source]
        self.checked[source] = problem = self._compare(source, user)
        return problem

    def _involved(self, node: fx.Node) -> bool:
        seen, todo = set(), [node]
        while todo:
            found = todo.pop()
            if found in seen:
                continue
            seen.add(found)
            if has_slots(self.slots, found) or counts(self.slots, found.meta.get("val")):
                return True
            todo += found.all_input_nodes
        return False

    def _compare(self, source: fx.Node, user: fx.Node) -> str | None:
        if source.op == "get_attr" or not self._involved(source):
            return None
        if source.op == "placeholder":
            return None if _operation(user) in (cache_append, position_mask) else "reads the slots themselves"
        what = f"reads {source.name!r}, which cannot be followed for different numbers of slots"
        try:
            few, many = self.make(source, 0), self.make(source, 1)
        except Exception:  # an op that needs more than sizes
            return what
        values = node_values(source)
        if not isinstance(few, Tensor) or not isinstance(many, Tensor) or len(values) != 1:
            return what
        places = [i for i, sizes in enumerate(zip(few.shape, many.shape, strict=True)) if sizes == (_FEW, _MANY)]
        for place in places:
            many = many.narrow(place, 0, _FEW)
        if few.shape == many.shape and torch.equal(few, many):
            return None
        if few.shape == many.shape and few.is_floating_point() and places == [few.dim() - 1]:
            moved = (few - many).double()
            if bool((moved - moved[..., :1]).abs().max() <= 1e-6 * moved.abs().max()) and self._only_weighed(source):
                return None  # the same for all slots: a softmax does not notice
        return f"reads {source.name!r}, whose values change with the number of slots"

    def _only_weighed(self, source: fx.Node) -> bool:
        """Whether all that becomes of it is to be added to scores, of which a softmax over the slots is taken."""
        for user in source.users:
            op = operation(user)
            if op in (aten.softmax, aten._softmax):
                if arguments(user)["dim"] not in (-1, len(node_values(user)[0].shape) - 1):
                    return False
            elif (op in (aten.add, aten.baddbmm, aten.masked_fill) and arguments(user).get("alpha", 1) == 1) or (
                op in IDENTITIES or op in (aten.expand, aten.unsqueeze)
            ):
                if arguments(user).get("beta", 1) != 1 or not self._only_weighed(user):
                    return False
            elif op is not attention or arguments(user)["mask"] is not source:
                return False
        return bool(source.users)

    def make(self, node: fx.Node, which: int) -> Any:
        """The value of a node made of sizes and weights, with few slots or many."""
        made = self.made[which]
        if node not in made:
            sizes = {"batch": _BATCH, "sequence": _SEQUENCE, "slots": (_FEW, _MANY)[which]}
            symbols = {symbol: sizes[name] for name, symbol in self.program.symbols.items()}
            values = node_values(node)
            if not values:
                made[node] = evaluate(node.meta["val"], symbols)
            elif node.op == "get_attr":
                made[node] = self._weight(str(node.target))
            elif node.op == "placeholder":
                made[node] = torch.arange(sizes["slots"])
            else:
                run: Callable[..., Any] = node.target  # type: ignore[assignment]
                args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda n: self.make(n, which))
                made[node] = run(*args, **kwargs)
        return made[node]

    def _weight(self, name: str) -> Tensor:
        """Its data, or numbers that are all different where others may be loaded."""
        weight = self.program.weights[name]
        if weight.numel > _LARGEST:
            raise ValueError(name)
        data = self.program.weight_data[name]
        if not data.is_meta and weight.source != "checkpoint":
            return data.cpu()
        return torch.arange(weight.numel).reshape(weight.shape).to(weight.dtype)


def _operation(node: fx.Node) -> Any:
    return operation(node) if node.op == "call_function" else None
