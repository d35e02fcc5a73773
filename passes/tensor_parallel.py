"""The tensor-parallel pass: column- and row-parallel linears, and the collectives between them.

    y[B,S,F/n] = linear(x, w[F/n, H])       column-parallel: each rank holds rows of w
    z[B,S,H]   = linear(y, w[H, F/n])       row-parallel: each rank holds columns of w, z is a partial sum
    z          = all_reduce(z, "tp")

The label analysis decides which weights are split, along which dim, and into which parts, which may be uneven and may
overlap. This pass carries that out, for the weights of experts over etp as well. Megatron-LM (arXiv:1909.08053, section
3), without tables of modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from partitioner.analysis.labels.block_borders import cut_notes
from partitioner.analysis.labels.choose_splits import Decisions, decide
from partitioner.analysis.labels.repeated_blocks import Blocks, find_blocks
from partitioner.analysis.layouts.localise import Scaled
from partitioner.analysis.layouts.propagate_layouts import Placement, Unplaceable, place
from partitioner.analysis.rules import notation
from partitioner.analysis.rules.decompose_norms import can_decompose, decompose
from partitioner.compile.insert_collectives import Rewriter
from partitioner.errors import PlanError
from partitioner.program.node_arguments import arguments, node_values, operation
from partitioner.program.program import Entry, Program
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Split, in_order, points
from runtime.ops.attention import attention
from runtime.ops.embedding import vocab_parallel_embedding

aten = torch.ops.aten

__all__ = ["TensorParallel"]


@dataclass(frozen=True)
class TensorParallel:
    """See the module's docstring.

    - axis: the mesh axis over which weights are split.
    - keep_whole: names of weights to leave replicated, each with the reason for the report.
    """

    name: ClassVar[str] = "tensor-parallel"
    axis: str = "tp"
    keep_whole: tuple[tuple[str, str], ...] = ()

    def run(self, program: Program) -> Program:
        if program.mesh.size(self.axis) == 1 and not program.unplaced:
            return program
        decisions, placement = self._place(program)
        dealt = {name for name, layout in program.weight_layouts.items() if not layout.is_replicated}
        program.weight_layouts = {n: w for n, w in program.weight_layouts.items() if not w.is_replicated}
        program.weight_layouts.update({n: w for n, w in placement.weights.items() if not w.is_replicated})
        kept = decisions.pinned | decisions.shared
        program.kept_whole.update({n: why for n, why in kept.items() if n not in dealt})
        program.split_classes |= decisions.classes
        program.notes += cut_notes(decisions.cuts)
        program.unplaced = False
        for name, layout in placement.states.items():
            program.states[name] = replace(program.states[name], layout=layout)
        _Rewriting(program, placement, self.axis).run()
        return program

    def _place(self, program: Program) -> tuple[Decisions, Placement]:
        """The splits, and where collectives go.

        Where an op cannot run on a rank's part alone, the next round keeps more indices together there; if that does
        not help, it leaves the weights of the op replicated.
        """
        keep_whole = dict(self.keep_whole)
        blocks = find_blocks(program, apart=keep_whole)
        together: dict[str, int] = {}
        misfits: dict[str, str] = {}
        partial: frozenset[str] | None = None
        while True:
            decisions = self._decide(program, blocks, keep_whole, misfits, together, partial)
            if partial is None:
                partial = _reduce_in_parts(program, decisions.partial)
                if partial:
                    blocks = find_blocks(program, apart=keep_whole)
                    continue  # the means and norms among them are sums now
            weights = {name: _layout(program, name, splits) for name, splits in decisions.splits.items()}
            weights = {**program.weight_layouts, **weights}
            try:
                return decisions, place(program, weights)
            except Unplaceable as trouble:
                level = together.get(trouble.node.name, 0)
                if level < 2:
                    together[trouble.node.name] = level + 1
                elif not blocks.is_analysed(trouble.node):
                    # what was learned from an identical layer does not hold in this one
                    together, blocks = {}, find_blocks(program, apart=keep_whole, compress=False)
                else:
                    # each round keeps at least one more weight whole, so this ends
                    misfits |= dict.fromkeys(trouble.weights or weights, trouble.reason)
                    if not decisions.splits:
                        raise PlanError(f"no placement over {self.axis!r} found: {trouble}") from trouble

    def _decide(
        self,
        program: Program,
        blocks: Blocks,
        keep_whole: dict[str, str],
        misfits: dict[str, str],
        together: dict[str, int],
        partial: frozenset[str] | None,
    ) -> Decisions:
        """Splits over tp; those of experts' own matrices over etp."""
        mesh = program.mesh
        experts = mesh.in_attention_view("etp")
        found = Decisions({}, frozenset(), {}, {})
        dealt = dict.fromkeys(program.weight_layouts, "dealt out by experts")
        for axis in dict.fromkeys((self.axis, *experts)):
            if mesh.size(axis) == 1:
                continue
            apart = dealt if axis == self.axis else dict.fromkeys(program.weights.keys() - dealt, "not of experts")
            whole = keep_whole | (apart if experts != (self.axis,) else {})
            more = decide(
                program, axis, blocks=blocks, keep_whole=whole, misfits=misfits, together=together, partial=partial
            )
            pinned = {name: why for name, why in more.pinned.items() if name not in apart}
            found = Decisions(
                found.splits | more.splits,
                found.partial | more.partial,
                found.pinned | pinned,
                found.shared | more.shared,
                found.classes | more.classes,
                found.cuts | more.cuts,
            )
        return found


def _layout(program: Program, name: str, splits: dict[int, Split]) -> Layout:
    layout = program.layout_of(name)
    for dim, split in splits.items():
        layout = layout.with_dim(dim, split)
    return layout


def _reduce_in_parts(program: Program, names: frozenset[str]) -> frozenset[str]:
    """Writes these reductions out as sums, and returns the names of the sums."""
    found: set[str] = set()
    for node in list(program.graph.nodes):
        if node.name in names:
            found.update(decompose(program, node) if can_decompose(node) else [node.name])
    return frozenset(found)


class _Rewriting(Rewriter):
    def __init__(self, program: Program, placement: Placement, axis: str) -> None:
        super().__init__(program, placement.layouts)
        self.placement, self.axis = placement, axis

    def run(self) -> None:
        for node in list(self.program.graph.nodes):
            for source, required in self.placement.requires.get(node, ()):
                self.provide(node, source, required)
            if node.op == "call_function":
                self._rewrite(node)
            layout = self.layouts.get(node)
            axes = self.placement.reduced.get(node)
            if layout is not None:
                node.meta["layout"] = layout if not axes else _as_partial(layout, axes)
            if axes:
                self.complete(node, axes)
        self.program.graph.lint()

    def _rewrite(self, node: fx.Node) -> None:
        done = self.placement.localised.get(node)
        if done is not None:
            # the operands may have been replaced since the placement: keep the node's own
            replaced = dict(zip((n for n, _ in self.placement.requires[node]), self.provided(node), strict=True))
            node.target = done.target
            node.args = self._insert(node, done.args, replaced)
            node.kwargs = self._insert(node, done.kwargs, replaced)
        op = operation(node)
        if op is aten.embedding:
            self._embedding(node)
        elif op is attention:
            self._kv_map(node)
        elif op in (aten.conv1d, aten.conv2d, aten.convolution):
            self._groups(node)
        self._explain(node)

    def _insert(self, node: fx.Node, value: Any, replaced: dict[fx.Node, fx.Node]) -> Any:
        def leaf(v: Any) -> Any:
            if isinstance(v, fx.Node):
                return replaced.get(v, v)
            if isinstance(v, Scaled):
                return self.scaled(node, v)
            return v

        return fx.node.map_aggregate(value, leaf)

    def _embedding(self, node: fx.Node) -> None:
        a = arguments(node)
        split = self.layouts[a["weight"]].dims[0]
        if split is None:
            return
        assert all(rows.is_interval for rows in split.owned), "rows of a table are dealt in order"
        starts = tuple(rows.intervals[0][0] if rows.intervals else 0 for rows in split.owned)
        start = self.program.local("vocab_start", Entry(0, split.axes, starts))
        node.target, node.args, node.kwargs = vocab_parallel_embedding, (a["indices"], a["weight"]), {}
        self.set_keyword(node, "start", start)

    def _kv_map(self, node: fx.Node) -> None:
        a = arguments(node)
        q, k = (self.layouts[a[name]].split(1) for name in ("q", "k"))
        via = dict(notation(node).operands[1].via).get("h")
        if q is None or (via is None and q == k):
            return
        heads = a["q"].meta["val"].shape[1]
        via = via or tuple(range(heads))
        every = IndexSet.range(0, a["k"].meta["val"].shape[1])
        maps, uniform = [], True
        mesh = self.program.mesh
        axes = q.axes if k is None else in_order((*q.axes, *k.axes))
        for coordinates in points(mesh, axes):
            mine = q.at(mesh, coordinates)
            place = {g: j for j, g in enumerate((k.at(mesh, coordinates) if k is not None else every).indices())}
            found = tuple(place[via[h]] for h in mine.indices())
            maps.append(found)
            uniform &= found == tuple(j * len(place) // len(found) for j in range(len(found)))
        if not uniform or a["kv_map"] is not None:
            entry = self.program.local("kv_map", Entry(via, axes, tuple(maps)))
            self.set_keyword(node, "kv_map", entry)

    def _groups(self, node: fx.Node) -> None:
        a = arguments(node)
        layout = self.layouts[node]
        split = layout.split(1) if isinstance(layout, Layout) else None
        if split is not None and a["groups"] != 1:
            groups = self.program.local("groups", Entry(a["groups"], split.axes, split.sizes))
            self.set_argument(node, "groups", groups)

    def _explain(self, node: fx.Node) -> None:
        """The reason, for whoever reads the graph."""
        if not node_values(node):
            return
        rule = None
        for source in node.all_input_nodes:
            layout = self.layouts.get(source)
            if source.op != "get_attr" or not isinstance(layout, Layout) or not layout.split_dims:
                continue
            rule = rule or notation(node)
            for operand in rule.operands:
                if operand.node is not source:
                    continue
                for letter, split in zip(operand.letters, layout.dims, strict=True):
                    if not isinstance(split, Split):
                        continue
                    kind = "row-parallel" if letter in rule.sums else "column-parallel"
                    if rule.sums:
                        node.meta["why"] = f"{kind} over {self.axis}: {source.target} split as {_sizes(split)}"


def _sizes(split: Split) -> str:
    return "/".join(map(str, split.sizes))


def _as_partial(layout: Any, axes: frozenset[str]) -> Any:
    return Layout(layout.dims, axes) if isinstance(layout, Layout) else tuple(Layout(x.dims, axes) for x in layout)
