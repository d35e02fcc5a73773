"""Bringing a value into the layout that a user requires: the one place where collectives and shards are inserted.

    partial sum -> complete        all_reduce(x, axis)
    whole       -> partial sum     once(x, first)
    split       -> whole           all_gather(x, axis, dim=, sizes=)     (and reorder, where the pieces interleave)
    whole       -> split           shard(x, ranges, dim=)
    split       -> smaller parts   shard(x, ranges, dim=)

Each conversion of a value is made once and shared by all who need it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from partitioner.analysis.layouts.infer_layout import Layouts, disjoint
from partitioner.analysis.layouts.localise import Scaled
from partitioner.errors import LayoutError
from partitioner.program.node_arguments import evaluate
from partitioner.program.program import Entry, Program, Value
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Rows, Split, in_order, points
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.local import once, reorder, shard

__all__ = ["Rewriter"]


class Rewriter:
    """Rewrites a program in place; `layouts` holds the layout of every node and grows with what is inserted."""

    def __init__(self, program: Program, layouts: Layouts) -> None:
        self.program, self.layouts = program, layouts
        self._made: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self._provided: dict[fx.Node, list[fx.Node]] = {}
        self._last: dict[fx.Node, fx.Node] = {}
        """The node after which conversions of a value go: itself, or its all-reduce."""
        self._completed: dict[fx.Node, fx.Node] = {}

    def provide(self, user: fx.Node, source: fx.Node, layout: Layout) -> None:
        """Makes `user` read `source` in the given layout."""
        current = self._completed.get(source, source)
        found = self._converted(current, layout)
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

    def _converted(self, source: fx.Node, want: Layout) -> fx.Node:
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
                if isinstance(old, Rows) or isinstance(new, Rows):
                    raise LayoutError(f"{source.name}: a rank's own rows cannot be converted from {old} to {new} here")
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
        order = [i for owned in parts.owned for i in owned.indices()]
        if order != sorted(order):
            inverse = sorted(range(len(order)), key=order.__getitem__)
            whole = self._after(whole, reorder, (whole, inverse), {"dim": dim}, self.layouts[whole], source)
        return whole

    def _after(
        self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], layout: Layout, origin: fx.Node
    ) -> fx.Node:
        place = self._last.get(origin, node)
        with self.program.graph.inserting_after(place if place.op != "placeholder" else self._last_placeholder()):
            made = self.program.graph.call_function(target, args, kwargs)
        made.meta = {"val": origin.meta["val"], "path": origin.meta.get("path", ""), "layout": layout}
        self.layouts[made] = layout
        self._last[origin] = made
        return made

    def _last_placeholder(self) -> fx.Node:
        found: list[fx.Node] = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        return found[-1]


def _over(axes: Iterable[str]) -> str | tuple[str, ...]:
    """As graphs name axes: one by its name, several as a tuple."""
    found = in_order(axes)
    return found[0] if len(found) == 1 else found


def _ranges(have: IndexSet, want: IndexSet) -> tuple[int, ...]:
    """Positions of `want` among the indices of `have`, as start, stop, start, stop, ..."""
    place = {index: i for i, index in enumerate(have.indices())}
    positions = IndexSet.of(place[i] for i in want.indices())
    return tuple(x for interval in positions.intervals for x in interval) or (0, 0)
