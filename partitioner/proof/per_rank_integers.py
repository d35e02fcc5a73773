"""That an integer of a node, which differs between ranks, is on each of them what layouts imply."""

from __future__ import annotations

from typing import Any

from torch import fx

from partitioner.errors import LayoutError
from partitioner.program.program import Entry, PerRankInt, Program
from partitioner.sharding.layout import in_order, points

__all__ = ["at", "expect"]


def at(node: fx.Node) -> str:
    """Where an error says that it is."""
    path = node.meta.get("path")
    return f"node {node.name!r}" + (f" in {path}" if path else "")


def expect(program: Program, node: fx.Node, name: str, given: Any, expected: Entry | int) -> None:
    """The integer must be `expected` at all coordinates: right numbers over another axis of equal size are wrong."""
    entry = program.table[given.name] if isinstance(given, PerRankInt) else Entry(given, (), (given,))
    wanted = expected if isinstance(expected, Entry) else Entry(expected, (), (expected,))
    axes = in_order((*entry.axes, *wanted.axes))
    for place in points(program.mesh, axes):
        got, want = (each.values[program.mesh.index(each.axes, place)] for each in (entry, wanted))
        if got != want:
            where = ", ".join(f"{axis}={at}" for axis, at in place.items())
            raise LayoutError(f"{at(node)}: {name} must be {want} at {where or 'every rank'}, got {got}")
