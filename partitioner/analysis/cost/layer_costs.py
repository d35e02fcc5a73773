"""What a program costs by kind of layer, as expressions to read: `print(parts.cost())`.

layers of one kind stand once, with their number; what stands outside layers is together
batch, sequence, past       as in `program_cost`
heads, kv_heads, ffn, ..    what a rank holds of each split class; `classes` says of how many
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from partitioner.analysis.cost.expressions import Expressions, NodeExpression
from partitioner.program.node_arguments import layer_of
from partitioner.program.program import Program
from partitioner.sharding.split_class import SplitClass

__all__ = ["LayerCost", "LayerCosts", "layer_costs"]


@dataclass(frozen=True)
class LayerCost:
    """Of one layer, or of all that is outside layers. meetings: bytes that a rank brings, by collective and axes."""

    name: str
    count: int
    flops: Any
    read: Any
    written: Any
    meetings: Mapping[str, Any]


@dataclass(frozen=True)
class LayerCosts:
    """See the module's docstring. unsure: what could not be said exactly."""

    layers: tuple[LayerCost, ...]
    classes: Mapping[str, SplitClass]
    unsure: tuple[str, ...]

    def total(self, what: str) -> Any:
        """flops, read or written of all layers together."""
        return sympy.expand(sum((layer.count * getattr(layer, what) for layer in self.layers), sympy.Integer(0)))

    def __str__(self) -> str:
        lines = []
        for layer in self.layers:
            lines.append(f"{layer.count} x {layer.name}")
            lines += [f"  {what:8} {getattr(layer, what)}" for what in ("flops", "read", "written")]
            lines += [f"  {name}: {size} bytes" for name, size in layer.meetings.items()]
        for name, kind in self.classes.items():
            lines.append(f"{name}: of {kind.groups}" + (f", for {kind.atoms}" if kind.atoms != kind.groups else ""))
        return "\n".join([*lines, *(f"unsure: {each}" for each in self.unsure)])


def layer_costs(program: Program, *, sequence: int = 5) -> LayerCosts:
    """Of a program that is laid out. sequence: as `expressions` has it."""
    made = Expressions(program, sequence)
    costs = made.all()
    classes = made.sizes.classes
    counts: dict[int, int] = {}
    first_of: dict[fx.Node, int] = {}
    for block in classes.blocks.blocks:
        model = block.model or block
        counts[id(model)] = counts.get(id(model), 0) + 1
        first_of.update(dict.fromkeys(model.nodes, id(model)))
    groups: dict[int, list[NodeExpression]] = {}
    for node, cost in costs.items():
        groups.setdefault(first_of.get(node, 0), []).append(cost)
    layers = tuple(_layer(found, counts.get(key, 1)) for key, found in groups.items())
    unsure = [f"{cost.name}: {cost.unsure}" for cost in costs.values() if cost.unsure]
    unsure += [f"{name}: counted as it is held on this plan" for name in dict.fromkeys(classes.guessed)]
    return LayerCosts(layers, {str(symbol): kind for (kind, _), symbol in classes.symbols.items()}, tuple(unsure))


def _layer(costs: list[NodeExpression], count: int) -> LayerCost:
    meetings: dict[str, Any] = {}
    for cost in costs:
        for meeting in cost.meetings:
            name = f"{meeting.kind} over {' x '.join(meeting.axes)}"
            meetings[name] = sympy.expand(meetings.get(name, 0) + meeting.bytes)
    paths = [layer_of(cost.path) for cost in costs]
    name = next((path for path in paths if path), "") or "outside layers"
    flops, read, written = (
        sympy.expand(sum((getattr(cost, what) for cost in costs), sympy.Integer(0)))
        for what in ("flops", "read", "written")
    )
    return LayerCost(name, count, flops, read, written, meetings)
