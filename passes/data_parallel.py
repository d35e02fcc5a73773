"""The data-parallel pass: the ranks of dp, which share out experts, run sequences of their own.

    input_ids[B_i, S]   every op that works sequence by sequence: a rank's own
    exchange            expert_send -> its experts -> expert_return                 own tokens are sent, and come back
    gather              collect_rows -> localise_experts -> .. -> scatter_rows      the tokens of all, and their sums
    logits[B_i, 1, V]   of its own sequences

Replicas that share no experts have separate process groups, and need no pass. Where experts span dp, the ranks run in
lock-step: the same program at the same time, each on its own requests, with collectives in the experts alone ("DP
attention" of arXiv:2412.19437, section 3.4). That no sequence depends on another is proven first
(`partitioner/proof/rows.py`).

With `gather`, every rank must bring the same number of rows, so the runtime pads shorter ones. With `exchange`, numbers
may differ.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from partitioner.analysis.layouts.dealt_experts import expert_bodies
from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.analysis.layouts.memoise import Inferrer
from partitioner.analysis.layouts.own_tokens import has_own, summed_by_experts, tokens_dim, works_row_by_row
from partitioner.compile.insert_collectives import OVER_AXES, Rewriter, over_other_axes
from partitioner.errors import PlanError
from partitioner.program.node_arguments import describe, node_values
from partitioner.program.program import Entry, Program
from partitioner.proof.layouts import SPECIAL, infer_layouts, layout_or_problem
from partitioner.sharding.layout import Layout, Rows
from runtime.ops.communicating import as_axes
from runtime.ops.expert_exchange import expert_send
from runtime.ops.rows import collect_rows, scatter_rows, take_rows

__all__ = ["DataParallel"]

KIND = "batch"


@dataclass(frozen=True)
class DataParallel:
    """See the module's docstring. Runs after tensor-parallel, on a program whose ranks all have the same batch.

    Where an op needs all sequences, the program is returned as it was, and a note says why.

    - gathers: whether experts may gather the tokens of all ranks. That needs as many tokens on each: prompts would be
      padded, and ranks of sp would hold different numbers of padded tokens.
    - axis: the mesh axis over which the batch is divided.
    - alike: whether every rank always runs the same number of tokens, as captured decode steps do. Then no host waits
      to learn how many tokens were sent to its experts.
    """

    name: ClassVar[str] = "data-parallel"
    gathers: bool = True
    axis: str = "dp"
    alike: bool = False

    def run(self, program: Program) -> Program:
        ranks = program.mesh.size(self.axis)
        if ranks == 1:
            return program
        if KIND not in program.symbols:
            program.notes.append(f"{self.axis}={ranks}: {program.name} was captured for one batch size only")
            return program
        own = program.copy()
        try:
            _Own(own, self.axis, gathers=self.gathers).run()
        except PlanError as why:
            program.notes.append(str(why))
            return program
        if self.alike:
            for node in own.graph.nodes:
                if node.target is expert_send and as_axes(node.args[3]) == (self.axis,):
                    node.kwargs = {**node.kwargs, "alike": True}
        own.notes = [note for note in own.notes if "are given one batch" not in note]
        own.notes.append(f"the {ranks} ranks of {self.axis} have sequences of their own, and meet in the experts")
        return own


class _Own:
    def __init__(self, program: Program, axis: str, *, gathers: bool) -> None:
        self.program, self.axis, self.gathers = program, axis, gathers
        self.symbol = program.symbols[KIND]
        self.rows = Rows((axis,), KIND)
        self.parts = program.mesh.size(axis)
        self.whole: Layouts = {}
        """How each value was held, when all ranks had one batch."""
        self.now: Layouts = {}
        self.inferrer = Inferrer(program)
        self.sizes = Rewriter(program, self.now)
        self.kept: set[fx.Node] = set()
        """Experts that need the tokens of all ranks."""
        self.made: dict[fx.Node, fx.Node] = {}
        """What was collected, or dealt out, of a value."""
        self.summed = summed_by_experts(axis)

    def run(self) -> None:
        nodes = list(self.program.graph.nodes)
        self.whole = infer_layouts(self.program, self.inferrer)
        for body in expert_bodies(self.program, self.whole):
            if not body.takes_own(self.axis):
                if not self.gathers:
                    why = f"gets as many tokens of each rank of {self.axis}, for which prompts are filled up"
                    raise self._refused(body.dispatch, why)
                self.kept |= body.nodes
        self.program.batch_axes = (self.axis,)
        for node in nodes:
            if node.op == "placeholder":
                self.now[node] = self.program.given(node.meta["val"])
            elif node.op == "get_attr":
                self.now[node] = self.whole[node]
        for node in nodes:
            if node in self.whole:
                self._place(node)
                node.meta["layout"] = self.now[node]
            elif node.op == "output":
                self._give(node)
        self.program.graph.eliminate_dead_code()
        self.program.graph.lint()

    def _place(self, node: fx.Node) -> None:
        if node in self.now:
            return
        if node in self.kept:
            for source in list(node.all_input_nodes):
                if source not in self.kept and self._has_rows(source):
                    node.replace_input_with(source, self._collected(source))
            self.now[node] = self.whole[node]
            return
        for source in list(node.all_input_nodes):
            if source in self.kept and node_values(source):
                node.replace_input_with(source, self._leaving(source))
        if node.target in OVER_AXES and self._has_rows(own := node.all_input_nodes[0]):
            self._narrow(node, own)
            return
        found = layout_or_problem(self.program, node, self.now, self.inferrer)
        if isinstance(found, str):
            raise self._refused(node, found)
        if unmet := next((source for source, wanted in found[1] if self.now[source] != wanted), None):
            raise self._refused(node, f"needs {unmet.name!r} of all sequences")
        if not works_row_by_row(node, found[0], self.whole[node], self.rows, self.symbol, self.summed):
            raise self._refused(node, "has no row for each sequence in its result")
        self.now[node] = found[0]

    def _refused(self, node: fx.Node, why: str) -> PlanError:
        return PlanError(
            f"{self.axis}={self.parts}: the ranks of {self.program.name} cannot have sequences of their own: "
            f"{describe(node)} (node {node.name!r}) {why}"
        )

    def _narrow(self, node: fx.Node, own: fx.Node) -> None:
        """`node` over those of its axes whose ranks have the same sequences; nothing where there are none."""
        total = node.args[1] if node.target is collect_rows else None
        if over_other_axes(self.program, node, own, self.summed, total=total):
            self.now[node] = SPECIAL[node.target](self.program, node, self.now)
        else:
            node.replace_all_uses_with(own)
            self.now[node] = self.now[own]

    def _give(self, output: fx.Node) -> None:
        for source in list(output.all_input_nodes):
            if source in self.kept:
                output.replace_input_with(source, self._leaving(source))

    # -- experts that need the tokens of all ---------------------------------------------------------------------------

    def _collected(self, own: fx.Node) -> fx.Node:
        """The rows of all ranks, as many of each."""
        if own not in self.made:
            (dim,) = self.now[own].row_dims
            value = own.meta["val"]
            mine = self.sizes.whole_size(value.shape[dim], own)  # inputs are of own sequences
            with self.program.graph.inserting_after(own):
                total = self.program.graph.call_function(operator.mul, (mine, self.parts))
            total.meta = {"val": value.shape[dim], "path": ""}
            layout = self.now[own].with_dim(dim, None)
            why = f"experts over {self.axis} get the tokens of all its ranks"
            self.made[own] = self._insert(total, own, collect_rows, (own, total, self.axis), {"dim": dim}, layout, why)
        return self.made[own]

    def _leaving(self, source: fx.Node) -> fx.Node:
        """Own rows of what was computed of those of all, summed over ranks that have others."""
        layout, dim = self.whole[source], tokens_dim(source.meta["val"].shape, self.symbol)
        if not isinstance(layout, Layout) or dim is None or layout.dims[dim] is not None:
            return source
        if source not in self.made:
            if self.axis in layout.partial:
                done = Layout(layout.dims, layout.partial - {self.axis}).with_dim(dim, self.rows)
                why = f"completes the partial sums of {source.name}, of which each rank of {self.axis} needs its own"
                options = {"dim": dim, "kind": KIND}
                found = self._insert(source, source, scatter_rows, (source, self.axis), options, done, why)
            else:
                index = self.program.local("row_index", Entry(0, (self.axis,), tuple(range(self.parts))))
                options = {"parts": self.parts, "axes": [self.axis], "dim": dim, "kind": KIND}
                done = layout.with_dim(dim, self.rows)
                found = self._insert(source, source, take_rows, (source, index), options, done, "")
            self.made[source] = found
        return self.made[source]

    def _insert(
        self,
        place: fx.Node,
        origin: fx.Node,
        target: Any,
        args: tuple[Any, ...],
        options: dict[str, Any],
        layout: Layout,
        why: str,
    ) -> fx.Node:
        with self.program.graph.inserting_after(place):
            made = self.program.graph.call_function(target, args, options)
        made.meta = {"val": origin.meta["val"], "path": origin.meta.get("path", ""), "layout": layout, "why": why}
        self.now[made] = layout
        return made

    def _has_rows(self, node: fx.Node) -> bool:
        return has_own(self.now.get(node), self.rows)
