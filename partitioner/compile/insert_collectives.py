"""Bringing a value into the layout that a user requires: the one place where collectives and shards are inserted.

    partial sum -> complete        all_reduce(x, axis)
    whole       -> partial sum     once(x, first)
    split       -> whole           all_gather(x, axis, dim=, sizes=)     (and reorder, where the pieces interleave)
    whole       -> split           shard(x, ranges, dim=)
    split       -> smaller parts   shard(x, ranges, dim=)
    whole       -> own rows        take_rows(x, index, dim=)             no communication
    own rows    -> whole           collect_rows(x, total, axis, dim=)    `total`: a size of the whole, from an input
    partial sum -> own rows        scatter_rows(x, axis, dim=)           only where it is asked for, by `scattered`

Each conversion of a value is made once and shared by all who need it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from partitioner.analysis.layouts.infer_layout import Layouts, disjoint
from partitioner.analysis.layouts.localise import Scaled
from partitioner.analysis.layouts.merged_rows import sequences_in_order
from partitioner.errors import LayoutError
from partitioner.program.node_arguments import evaluate
from partitioner.program.program import Entry, Program, Value
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Rows, Split, in_order, points
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.communicating import Axes, axis_argument, read_call
from runtime.ops.local import once, reorder, shard
from runtime.ops.rows import collect_rows, scatter_rows, take_rows

aten = torch.ops.aten

__all__ = ["OVER_AXES", "Rewriter", "over_other_axes"]


class Rewriter:
    """Rewrites a program in place; `layouts` holds the layout of every node and grows with what is inserted."""

    def __init__(self, program: Program, layouts: Layouts) -> None:
        self.program, self.layouts = program, layouts
        self._made: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self._provided: dict[fx.Node, list[fx.Node]] = {}
        self._last: dict[fx.Node, fx.Node] = {}
        """The node after which conversions of a value go: itself, or its all-reduce."""
        self._completed: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[Any, fx.Node | int] = {}
        """Nodes with sizes of the whole, behind the inputs."""
        self._latest_size: fx.Node | None = None
        self._own_sizes: dict[Any, fx.Node] = {}

    def provide(self, user: fx.Node, source: fx.Node, layout: Layout) -> None:
        """Makes `user` read `source` in the given layout."""
        current = self._completed.get(source, source)
        found = self.converted(current, layout)
        self._provided.setdefault(user, []).append(found)
        if found is not current:
            user.replace_input_with(current, found)

    def provided(self, user: fx.Node) -> list[fx.Node]:
        """What `user` reads now, in the order of its requirements."""
        return self._provided.get(user, [])

    def complete(self, node: fx.Node, axes: frozenset[str]) -> None:
        """All-reduces what `node` yields, for every user."""
        if not isinstance(node.meta["val"], Value):
            raise LayoutError(
                f"{node.name} yields several tensors that are partial sums over {sorted(axes)}: not supported"
            )
        users = list(node.users)
        layout = self.layouts[node]
        done = Layout(layout.dims, layout.partial - axes)
        reduced = self._after(node, all_reduce, (node, _over(axes)), {}, done, node)
        reduced.meta["why"] = f"completes the partial sums of {node.name}"
        for user in users:
            user.replace_input_with(node, reduced)
        self._completed[node] = reduced

    def scaled(self, node: fx.Node, size: Scaled) -> fx.Node:
        """Inserts local * (symbolic size // whole) before `node`."""
        with self.program.graph.inserting_before(node):
            outer = self.program.graph.call_function(operator.floordiv, (size.node, size.whole))
            local = self.program.graph.call_function(operator.mul, (outer, size.local))
        outer.meta = {"val": size.node.meta["val"] / size.whole, "path": node.meta.get("path", "")}
        local.meta = {"val": size.node.meta["val"], "path": node.meta.get("path", "")}
        return local

    def set_argument(self, node: fx.Node, name: str, value: Any) -> None:
        """Sets an argument by its parameter's name, wherever it stands."""
        assert isinstance(node.target, torch._ops.OpOverload)
        names = [argument.name for argument in node.target._schema.arguments]
        place = names.index(name)
        if place < len(node.args):
            node.args = (*node.args[:place], value, *node.args[place + 1 :])
        else:
            self.set_keyword(node, name, value)

    def set_keyword(self, node: fx.Node, name: str, value: Any) -> None:
        node.kwargs = {**node.kwargs, name: value}

    # -- conversions ---------------------------------------------------------------------------------------------------

    def converted(self, source: fx.Node, want: Layout) -> fx.Node:
        """`source` in the given layout."""
        have = self.layouts[source]
        if have == want or not isinstance(have, Layout):
            return source
        if (source, want) in self._made:
            return self._made[source, want]
        found = source
        if surplus := have.partial - want.partial:
            done = Layout(have.dims, have.partial - surplus)
            found = self._after(found, all_reduce, (found, _over(surplus)), {}, done, source)
            have = self.layouts[found]
        for dim, (old, new) in enumerate(zip(have.dims, want.dims, strict=True)):
            if old != new:
                levels = new.levels if isinstance(new, Rows) else ()
                while isinstance(old, Rows) and old not in levels:
                    found, old = self._collected(found, dim, old, source), old.of
                if isinstance(new, Rows):
                    if isinstance(old, Split):
                        found, old = self._redivided(found, dim, old, None, source), None
                    for level in levels[0 if old is None else levels.index(old) + 1 :]:
                        found = self._taken(found, dim, level, source)
                elif old != new:
                    found = self._redivided(found, dim, old, new, source)
        have = self.layouts[found]
        if missing := in_order(want.partial - have.partial):
            ranks = self.program.mesh.size(*missing)
            first = self.program.local("first", Entry(1, missing, tuple(int(i == 0) for i in range(ranks))))
            counted = Layout(have.dims, have.partial | set(missing))
            found = self._after(found, once, (found, first), {}, counted, source)
            found.meta["why"] = "the same on every rank: counted once in the sum over ranks"
        self._made[source, want] = found
        return found

    def _redivided(self, node: fx.Node, dim: int, old: Split | None, new: Split | None, source: fx.Node) -> fx.Node:
        have: Layout = self.layouts[node]
        if new is not None:
            whole = source.meta["val"].shape[dim]
            size = evaluate(whole, dict.fromkeys(self.program.symbols.values(), 1))
            kwargs: dict[str, Any] = {"dim": dim}
            if size != whole:
                local = size if old is None else self.program.local("period", Entry(size, old.axes, old.sizes))
                kwargs["period"] = local
            axes = new.axes if old is None else in_order((*old.axes, *new.axes))
            if old is not None and axes != new.axes:
                raise LayoutError(f"{source.name}: cannot go from {old} to {new} in dim {dim}")
            mesh = self.program.mesh
            ranges = tuple(
                _ranges(old.at(mesh, place) if old else IndexSet.range(0, size), new.at(mesh, place))
                for place in points(mesh, axes)
            )
            local = self.program.local("ranges", Entry((0, size), axes, ranges))
            return self._after(node, shard, (node, local), kwargs, have.with_dim(dim, new), source)
        assert old is not None
        parts = disjoint(old)
        if parts != old:
            node = self._redivided(node, dim, old, parts, source)
        kwargs = {"dim": dim, "sizes": list(parts.sizes)}
        whole = self._after(
            node, all_gather, (node, _over(parts.axes)), kwargs, self.layouts[node].with_dim(dim, None), source
        )
        whole.meta["why"] = f"{source.name} is needed whole"
        intervals = [interval for owned in parts.owned for interval in owned.intervals]
        if intervals != sorted(intervals):
            order = [i for owned in parts.owned for i in owned.indices()]
            inverse = sorted(range(len(order)), key=order.__getitem__)
            whole = self._after(whole, reorder, (whole, inverse), {"dim": dim}, self.layouts[whole], source)
        return whole

    def _collected(self, node: fx.Node, dim: int, rows: Rows, source: fx.Node) -> fx.Node:
        size = source.meta["val"].shape[dim]
        outer = self._outer(source, dim, rows)
        size = self.program.symbols[rows.kind] if outer else size
        # of own sequences, a rank that deals out their tokens has all of them before
        of = None if rows.of in rows.by_dim else rows.of
        total = self.whole_size(size, source) if of is None else self._own_size(size, of, source)
        layout: Layout = self.layouts[node].with_dim(dim, rows.of)
        options = {"dim": dim, **_order(rows)}
        args = (node, total, _over(rows.last_axes), *outer)
        whole = self._after(node, collect_rows, args, options, layout, source)
        whole.meta["why"] = f"{source.name} is needed with the rows of all ranks"
        return whole

    def _own_size(self, size: Any, rows: Rows, source: fx.Node) -> fx.Node:
        """How many of `rows` this rank has: read off the first value that has them."""
        if (size, rows) not in self._own_sizes:
            for node in self.program.graph.nodes:
                layout = self.layouts.get(node)
                dims = layout.dims if isinstance(layout, Layout) else ()
                if found := [i for i, d in enumerate(dims) if d == rows and node.meta["val"].shape[i] == size]:
                    with self.program.graph.inserting_after(node):
                        made = self.program.graph.call_function(aten.sym_size.int, (node, found[0]))
                    made.meta = {"val": size, "path": ""}
                    self._own_sizes[size, rows] = made
                    break
            else:
                raise LayoutError(f"{source.name}: how many {rows} a rank has, {size}, is no size of any value")
        return self._own_sizes[size, rows]

    def _taken(self, node: fx.Node, dim: int, rows: Rows, source: fx.Node) -> fx.Node:
        axes = rows.last_axes
        parts = self.program.mesh.size(*axes)
        index = self.program.local("row_index", Entry(0, axes, tuple(range(parts))))
        options = {"parts": parts, "axes": list(axes), "dim": dim, "kind": rows.kind, **_order(rows)}
        layout: Layout = self.layouts[node].with_dim(dim, rows)
        return self._after(node, take_rows, (node, index, *self._outer(source, dim, rows)), options, layout, source)

    def scattered(self, source: fx.Node, dim: int, rows: Rows) -> fx.Node:
        """Own rows of a sum over the last axes of `rows`."""
        have: Layout = self.layouts[source]
        layout = Layout(have.dims, have.partial - set(rows.last_axes)).with_dim(dim, rows)
        if (source, layout) not in self._made:
            args = (source, _over(rows.last_axes), *self._outer(source, dim, rows))
            options = {"dim": dim, "kind": rows.kind, **_order(rows)}
            self._made[source, layout] = self._after(source, scatter_rows, args, options, layout, source)
        return self._made[source, layout]

    def _outer(self, source: fx.Node, dim: int, rows: Rows) -> tuple[fx.Node | int, ...]:
        """How many sequences a dim runs over, one after the other, with own rows of each; nothing where it is one."""
        size, symbol = source.meta["val"].shape[dim], self.program.symbols.get(rows.kind)
        if symbol is None or size == symbol:
            return ()
        if not sequences_in_order(source, dim, symbol):
            raise LayoutError(
                f"{source.name}: its dim {dim} has {size} rows, and it cannot be told that they are sequences, one "
                f"after the other: no rank knows which {rows} are its own"
            )
        return (self.whole_size(size / symbol, source),)

    def whole_size(self, size: Any, source: fx.Node) -> fx.Node | int:
        """A node with this size of the whole, read from an input, which every rank has all of."""
        if size not in self._sizes:
            graph = self.program.graph
            factors = sympy.sympify(size).as_ordered_factors()
            made = [int(factor) if factor.is_Integer else self._symbol(factor, source) for factor in factors]
            product, value = made[0], factors[0]
            for factor, node in zip(factors[1:], made[1:], strict=True):
                value = value * factor
                with graph.inserting_after(self._end_of_inputs()):
                    product = self._latest_size = graph.call_function(operator.mul, (product, node))
                product.meta = {"val": value, "path": ""}
            self._sizes[size] = product
        return self._sizes[size]

    def _symbol(self, symbol: Any, source: fx.Node) -> fx.Node | int:
        for placeholder in [node for node in self.program.graph.nodes if node.op == "placeholder"]:
            shape = placeholder.meta["val"].shape
            if symbol in shape:
                if symbol not in self._sizes:
                    with self.program.graph.inserting_after(self._end_of_inputs()):
                        made = self.program.graph.call_function(aten.sym_size.int, (placeholder, shape.index(symbol)))
                    made.meta = {"val": symbol, "path": ""}
                    self._sizes[symbol] = self._latest_size = made
                return self._sizes[symbol]
        raise LayoutError(f"{source.name}: how many rows all ranks have together, {symbol}, is no size of an input")

    def _after(
        self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout, origin: fx.Node
    ) -> fx.Node:
        place = self._last.get(origin, node)
        with self.program.graph.inserting_after(place if place.op != "placeholder" else self._end_of_inputs()):
            made = self.program.graph.call_function(target, args, kwargs)
        made.meta = {"val": origin.meta["val"], "path": origin.meta.get("path", ""), "layout": layout}
        self.layouts[made] = layout
        self._last[origin] = made
        return made

    def _end_of_inputs(self) -> fx.Node:
        """The last placeholder, or the last of the sizes read from them."""
        return self._latest_size or [n for n in self.program.graph.nodes if n.op == "placeholder"][-1]


def _over(axes: Iterable[str]) -> Axes:
    return axis_argument(in_order(axes))


OVER_AXES = (all_reduce, once, take_rows, collect_rows)
"""Ops that `over_other_axes` knows."""


def over_other_axes(program: Program, node: fx.Node, own: fx.Node, summed: frozenset[str], *, total: Any) -> bool:
    """Makes `node` work on `own` over its axes that are not `summed`; False, and left as it is, where there are none.

    all_reduce(x, ("sp", "tp"))       a sum over tp        what it was over sp has been summed elsewhere
    once(x, first)                    once in a sum over tp
    take_rows(x, axes=["sp", "tp"])   of own tokens, those that a rank of tp is to send
    collect_rows(x, total, ..)        own tokens again; `total`: how many of these there are

    total: of collect_rows, how many tokens `own` is a part of; None for the others.
    """
    left = tuple(axis for axis in _axes(program, node) if axis not in summed)
    if not left:
        return False
    parts = program.mesh.size(*left)
    args: Any = (own, _over(left))
    if node.target is once:
        args = (own, program.local("first", Entry(1, left, tuple(int(i == 0) for i in range(parts)))))
    elif node.target is take_rows:
        args = (own, program.local("row_index", Entry(0, left, tuple(range(parts)))))
        node.kwargs = {**node.kwargs, "parts": parts, "axes": list(left)}
    elif node.target is collect_rows:
        args = (own, total, _over(left))
    node.args = args
    return True


def _axes(program: Program, node: fx.Node) -> tuple[str, ...]:
    if node.target is once:
        first: Any = node.args[1]
        return program.table[first.name].axes
    if node.target is take_rows:
        named: Any = node.kwargs["axes"]
        return tuple(named)
    return read_call(node).axes


def _order(rows: Rows) -> dict[str, str]:
    return {} if rows.order == "blocks" else {"order": rows.order}


def _ranges(have: IndexSet, want: IndexSet) -> tuple[int, ...]:
    """Positions of `want` among the indices of `have`, as start, stop, start, stop, ..."""
    place = {index: i for i, index in enumerate(have.indices())}
    positions = IndexSet.of(place[i] for i in want.indices())
    return tuple(x for interval in positions.intervals for x in interval) or (0, 0)
