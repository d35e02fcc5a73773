"""That the integers of a node, which differ between ranks, are on each of them what layouts imply.

vocab_parallel_embedding   start     the first row of the table that the rank holds
attention                  kv_map    for each of its query heads, the place of its kv head among the rank's
convolution                groups    how many groups of channels it holds
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.analysis.rules import notation
from partitioner.errors import LayoutError
from partitioner.program.node_arguments import arguments
from partitioner.program.program import Entry, PerRankInt, Program
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Split, in_order, points
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention
from runtime.ops.embedding import vocab_parallel_embedding
from runtime.ops.rows.sequence_attention import cached_sequence_attention, sequence_attention

aten = torch.ops.aten

__all__ = ["INTEGERS", "Checks", "at", "expect", "sizes_entry"]

Checks = dict[Any, Callable[[Program, fx.Node, Layouts], None]]
"""By op, what raises `LayoutError` where a node is wrong."""


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


def sizes_entry(split: Split) -> Entry:
    """How many indices of a split dim each rank holds."""
    return Entry(None, split.axes, split.sizes)


def _check_start(program: Program, node: fx.Node, layouts: Layouts) -> None:
    a = arguments(node)
    rows = layouts[a["weight"]].dims[0]
    expected: Entry | int = 0
    if isinstance(rows, Split):
        if not all(owned.is_interval for owned in rows.owned):
            raise LayoutError(f"a look-up table is split into {rows}: each rank needs one run of rows")
        starts = (owned.intervals[0][0] if owned.intervals else 0 for owned in rows.owned)
        expected = Entry(0, rows.axes, tuple(starts))
    expect(program, node, "start", a["start"], expected)


def _check_groups(program: Program, node: fx.Node, layouts: Layouts) -> None:
    groups = arguments(node)["groups"]
    split = layouts[node.all_input_nodes[0]].dims[1]
    if groups != 1 and isinstance(split, Split):
        expect(program, node, "groups", groups, sizes_entry(split))


def _check_kv_map(program: Program, node: fx.Node, layouts: Layouts) -> None:
    a = arguments(node)
    q, k = (layouts[a[name]].split(1) for name in ("q", "k"))
    if q is None:
        return
    heads, kv_heads = a["q"].meta["val"].shape[1], a["k"].meta["val"].shape[1]
    via = dict(notation(node).operands[1].via).get("h") or tuple(range(heads))
    entry = program.table[a["kv_map"].name] if isinstance(a["kv_map"], PerRankInt) else Entry(None, (), (None,))
    mesh = program.mesh
    for place in points(mesh, in_order((*q.axes, *(k.axes if k is not None else ()), *entry.axes))):
        mine = q.at(mesh, place)
        held = (k.at(mesh, place) if k is not None else IndexSet.range(0, kv_heads)).indices()
        wanted = tuple(held.index(via[h]) for h in mine.indices())
        given = entry.values[mesh.index(entry.axes, place)]
        if given is None:
            given = tuple(j * len(held) // max(len(wanted), 1) for j in range(len(wanted)))
        if given != wanted:
            raise LayoutError(f"{at(node)}: query heads {mine} must read local kv heads {wanted}, they read {given}")


INTEGERS: Checks = {
    vocab_parallel_embedding: _check_start,
    **dict.fromkeys((attention, cached_attention, sequence_attention, cached_sequence_attention), _check_kv_map),
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.convolution), _check_groups),
}
