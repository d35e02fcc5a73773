"""Steps of label runs, taken once: runs over one program differ in a few weights that stay whole.

What a step yields and finds follows from what is known of its operands, from whether it may split the weights among
them, and from whether it is a sum that is carried out in parts. Operands are the same where they are the same objects:
the runs share the sets and the numbers of the labels, so that what was made once stands for itself in all of them. A
step behind a weight that is newly whole is taken again, up to where everything is free.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from partitioner.analysis.labels.index_sets import Lattice
from partitioner.analysis.labels.label_state import Labels, Numbers, WeightState
from partitioner.analysis.rules import notation
from partitioner.analysis.rules.notation import Notation

__all__ = ["LabelMemory"]


@dataclass(frozen=True)
class _Taken:
    """operands: kept, so that no other object comes to have the identity of one of them."""

    operands: tuple[Any, ...]
    state: Any
    found: Labels


class LabelMemory:
    """Of the runs over one program, for as many ranks and with the same nodes kept together."""

    def __init__(self) -> None:
        self._lattice, self._numbers = Lattice(), Numbers()
        self._taken: dict[tuple[Any, ...], _Taken] = {}
        self._places: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
        self._rules: dict[fx.Node, Notation] = {}

    def labels(self) -> Labels:
        """Those of a run, or of a step, that has found nothing yet."""
        return Labels(self._lattice, self._numbers)

    def step(
        self,
        node: fx.Node,
        operands: tuple[Any, ...],
        pinned: Set[str],
        partial: Set[str],
        work: Callable[[fx.Node], tuple[Any, Labels]],
    ) -> tuple[Any, Labels]:
        """What `work` yields: the state of a node with these operands, and what was found on the way."""
        whole = tuple(state.name in pinned for state in operands if isinstance(state, WeightState))
        key = (node, node.name in partial, whole, *map(id, operands))
        taken = self._taken.get(key)
        if taken is None:
            taken = self._taken[key] = _Taken(operands, *work(node))
        return taken.state, taken.found

    def rule(self, node: fx.Node) -> Notation:
        found = self._rules.get(node)
        if found is None:
            found = self._rules[node] = notation(node)
        return found

    def whole_weight(self, name: str, shape: tuple[int, ...]) -> WeightState:
        """For each dim the index along it of each element: the same for all weights of one shape."""
        if shape not in self._places:
            indices = []
            for dim, size in enumerate(shape):
                view = [1] * len(shape)
                view[dim] = size
                indices.append(torch.arange(size).view(view).expand(shape))
            self._places[shape] = tuple(indices)
        return WeightState(name, self._places[shape])
