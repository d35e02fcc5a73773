"""That rows are dealt out and collected as layouts have it: which, over which axes, and how many there are.

    take_rows      a dim of all rows, or of own rows that are dealt out once more over other axes
    collect_rows   own rows, over the axes over which they were dealt out last; how many there are is read off what has
                   all of them, or those that are shared out
    scatter_rows   a partial sum over the axes, of all rows or of own ones

Of a dim that runs over the tokens of several sequences, each rank has its own of each; so these must lie one after the
other, and the node must be told how many there are. Where a rank has sequences of its own, it has all their tokens, and
as many rows as any other rank where they are collected.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from partitioner.analysis.layouts.infer_experts import ROUTED
from partitioner.analysis.layouts.infer_layout import Layouts, sizes_read
from partitioner.analysis.layouts.merged_rows import sequences_in_order
from partitioner.errors import LayoutError
from partitioner.program.node_arguments import arguments, symbols_of
from partitioner.program.program import Entry, Program
from partitioner.proof.experts import require_landed
from partitioner.proof.per_rank_integers import at, expect
from partitioner.sharding.layout import Layout, Rows
from runtime.ops.communicating import read_call
from runtime.ops.rows import collect_rows, scatter_rows, take_rows

__all__ = ["ROWS"]

BATCH = "batch"


def _take_rows(program: Program, node: fx.Node, layouts: Layouts) -> Layout:
    a = arguments(node)
    layout: Layout = layouts[a["x"]]
    axes = tuple(a["axes"])
    indices = tuple(range(program.mesh.size(*axes)))
    if a["parts"] != len(indices):
        raise LayoutError(f"{at(node)} deals rows to {a['parts']} ranks, where {axes} has {len(indices)}")
    expect(program, node, "index", a["index"], Entry(0, axes, indices))
    size, before = a["x"].meta["val"].shape[a["dim"]], layout.dims[a["dim"]]
    fits = before is None or (isinstance(before, Rows) and before.kind != ROUTED)
    if not fits or (layout.axes | layout.partial) & set(axes) or not _is_run_over(program, node, a["kind"]):
        raise LayoutError(
            f"{at(node)} takes {a['kind']} rows of dim {a['dim']} of {a['x']}, {size}, over {axes}, but it is {layout}"
        )
    rows = Rows(axes, a["kind"], a["order"]) if before is None else before.again(axes, a["kind"], a["order"])
    return layout.with_dim(a["dim"], rows)


def _is_run_over(program: Program, node: fx.Node, kind: str) -> bool:
    """Whether a dim has as many rows as its kind says, for each of the sequences that the node is told of.

    Of several, they must lie one after the other.
    """
    a = arguments(node)
    size, symbol, outer = a["x"].meta["val"].shape[a["dim"]], program.symbols.get(kind), a["outer"]
    outer = outer.meta["val"] if isinstance(outer, fx.Node) else outer
    if symbol is None:
        return bool(outer == 1)
    if kind == BATCH:
        return bool(outer == 1) and (size == symbol or _are_whole_sequences(program, node))
    return bool(size == outer * symbol) and (outer == 1 or sequences_in_order(a["x"], a["dim"], symbol))


def _are_whole_sequences(program: Program, node: fx.Node) -> bool:
    """Whether a dim runs over the tokens of one sequence, then of the next: those of own sequences lie together."""
    a, sequence = arguments(node), program.symbols.get("sequence")
    size = a["x"].meta["val"].shape[a["dim"]]
    if sequence is None or size != program.symbols[BATCH] * sequence:
        return False
    return sequences_in_order(a["x"], a["dim"], sequence)


def _collect_rows(program: Program, node: fx.Node, layouts: Layouts) -> Layout:
    a = arguments(node)
    layout: Layout = layouts[a["x"]]
    rows = layout.dims[a["dim"]]
    axes, order = read_call(node).axes, a["order"]
    if a["ahead"]:
        require_landed(node, [node])
    if not isinstance(rows, Rows) or (rows.last_axes, rows.order) != (axes, order) or rows.kind == ROUTED:
        raise LayoutError(
            f"{at(node)} collects {order} rows of {axes} along dim {a['dim']} of {a['x']}, which is {layout}"
        )
    total, size = a["total"], a["x"].meta["val"].shape[a["dim"]]
    if not _is_run_over(
        program, node, rows.kind
    ):  # each row of a batch has a part of its own: they do not lie in order
        raise LayoutError(f"{at(node)} collects {rows} along dim {a['dim']} of {a['x']}, which is {size} and more")
    if rows == program.own_batch:
        if not _is_multiple(program, node, len(program.mesh.group(axes, 0)), rows, layouts):
            raise LayoutError(f"{at(node)} collects as many rows of each rank of {axes}: its total {total} is not that")
        return layout.with_dim(a["dim"], None)
    found = total.meta["val"] if isinstance(total, fx.Node) else total
    wanted = program.symbols.get(rows.kind, size)
    if found != wanted or not _counts_rows_of(program, node, rows.of, layouts):
        held = "all ranks together" if rows.of is None else f"the {rows.of}"
        raise LayoutError(f"{at(node)} collects {size} rows of {held}, but its total {total} is {found}")
    return layout.with_dim(a["dim"], rows.of)


def _is_multiple(program: Program, node: fx.Node, parts: int, rows: Rows, layouts: Layouts) -> bool:
    """Whether the total that a node is told is `parts` times as many rows as a rank has."""
    a = arguments(node)
    total, size = a["total"], a["x"].meta["val"].shape[a["dim"]]
    if not isinstance(total, fx.Node) or total.target is not operator.mul or total.args[1] != parts:
        return False
    mine: Any = total.args[0]
    return (
        isinstance(mine, fx.Node) and bool(mine.meta["val"] == size) and _counts_rows_of(program, total, rows, layouts)
    )


def _counts_rows_of(program: Program, node: fx.Node, of: Rows | None, layouts: Layouts) -> bool:
    """Whether the numbers of rows that the node is told are read off what has the rows `of`; None: of all ranks."""
    known = {} if of is None else {program.symbols.get(each.levels[0].kind): each for each in of.by_dim}
    for read, dim in sizes_read(node):
        wanted = [rows for symbol, rows in known.items() if symbol in symbols_of(read.meta["val"].shape[dim])]
        held = layouts[read].dims[dim]
        if (list(held.by_dim) if isinstance(held, Rows) else []) != wanted:
            return False
    return None not in known


def _scatter_rows(program: Program, node: fx.Node, layouts: Layouts) -> Layout:
    a, axes = arguments(node), read_call(node).axes
    layout: Layout = layouts[a["x"]]
    before = layout.dims[a["dim"]]
    if a["ahead"]:
        require_landed(node, [node])
    fits = before is None or (isinstance(before, Rows) and before.kind != ROUTED)
    if not set(axes) <= layout.partial or not fits or not _is_run_over(program, node, a["kind"]):
        raise LayoutError(f"{at(node)} sums {a['x']} over {axes} and deals out its dim {a['dim']}, but it is {layout}")
    done = Layout(layout.dims, layout.partial - set(axes))
    rows = Rows(axes, a["kind"], a["order"]) if before is None else before.again(axes, a["kind"], a["order"])
    return done.with_dim(a["dim"], rows)


ROWS: dict[Any, Callable[[Program, fx.Node, Layouts], Layout]] = {
    take_rows: _take_rows,
    collect_rows: _collect_rows,
    scatter_rows: _scatter_rows,
}
