"""The sequence-parallel pass: between a row-parallel and a column-parallel linear, each rank has its own tokens.

    z = all_reduce(z, "tp"); h = norm(x + z); y = linear(h, w[F/n, H])           activations whole on every rank
    z_i = scatter_rows(z, "tp"); h_i = norm(x_i + z_i); h = collect_rows(h_i)    1/n of them, and of the work
    y = linear(h, w[F/n, H])

An all-reduce is a reduce-scatter and an all-gather, so the bytes are the same where n divides the tokens. Megatron's
sequence parallelism (arXiv:2205.05198, section 4.2.2), with the regions found by layouts: an op that works token by
token keeps a rank's own tokens, and the first op that does not gets the tokens of all ranks. For prompts and whole
texts: a single token has no sequence to divide. Where tokens are divided over sp already, the ranks of tp divide each
part further.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.analysis.layouts.memoise import Inferrer
from partitioner.compile.insert_collectives import Rewriter
from partitioner.errors import LayoutError, PlanError
from partitioner.program.node_arguments import node_values, operation, symbols_of
from partitioner.program.program import Program, Value
from partitioner.proof.layouts import infer_layouts, layout_or_problem
from partitioner.sharding.layout import Layout, Rows
from runtime.ops.collectives import all_reduce
from runtime.ops.communicating import read_call
from runtime.ops.rows import scatter_rows

aten = torch.ops.aten

__all__ = ["SequenceParallel"]

_VIEWS = (aten.view, aten.reshape, aten._unsafe_view)
KIND = "sequence"


@dataclass(frozen=True)
class SequenceParallel:
    """See the module's docstring. axis: the tensor-parallel axis, whose ranks divide the tokens between its linears."""

    name: ClassVar[str] = "sequence-parallel"
    axis: str = "tp"

    def run(self, program: Program) -> Program:
        if program.mesh.size(self.axis) == 1:
            return program
        if KIND not in program.symbols:
            raise PlanError(f"{program.name} was captured for one length only: its tokens cannot be dealt out")
        _Run(program, self.axis).run()
        return program


class _Run:
    def __init__(self, program: Program, axis: str) -> None:
        self.program, self.axis = program, axis
        self.symbol = program.symbols[KIND]
        self.whole: Layouts = {}
        """How each value was held, before its tokens were shared out."""
        self.now: Layouts = {}
        self.rewriter = Rewriter(program, self.now)
        self.inferrer = Inferrer(program)

    def run(self) -> None:
        for node in list(self.program.graph.nodes):
            self._sink(node)
        self.whole = infer_layouts(self.program, self.inferrer)
        for node in list(self.program.graph.nodes):
            if node.op == "output":
                self._give_whole(node)
            elif node not in self.whole:
                self._read_whole_size(node)
            elif self._is_reduction(node):
                self._scatter(node)
            else:
                self._place(node)
                node.meta["layout"] = self.now[node]
        self.program.graph.lint()

    def _sink(self, node: fx.Node) -> None:
        """An all-reduce whose result is only looked at in another shape is made in that shape."""
        if node.op != "call_function" or node.target is not all_reduce:
            return
        while len(node.users) == 1:
            (user,) = node.users
            if user.op != "call_function" or operation(user) not in _VIEWS or user.args[0] is not node:
                return
            source = node.args[0]
            assert isinstance(source, fx.Node)
            user.replace_all_uses_with(node)
            user.args = (source, *user.args[1:])
            user.append(node)
            node.args = (user, *node.args[1:])
            node.meta = {**node.meta, "val": user.meta["val"], "path": user.meta.get("path", "")}
            # what it was laid out as no longer is
            for each in (user, node):
                each.meta.pop("layout", None)

    def _is_reduction(self, node: fx.Node) -> bool:
        """Whether its result, needed by every rank, can be each rank's own tokens of it."""
        return (
            node.target is all_reduce
            and read_call(node).axes == (self.axis,)
            and self._tokens(node.meta["val"]) == 1
            and len(node.meta["val"].shape) == 3
            and self._dealt(self.whole[node].dims[1]) is not None
            and not self._has_rows(node.args[0])
        )

    def _scatter(self, node: fx.Node) -> None:
        node.target, node.kwargs = scatter_rows, {"dim": 1, "kind": KIND}
        layout: Layout = self.whole[node]
        self.now[node] = node.meta["layout"] = layout.with_dim(1, self._dealt(layout.dims[1]))
        node.meta["why"] = "each rank's own tokens of the sum, until an op needs those of all"

    def _place(self, node: fx.Node) -> None:
        """As it was, or with a rank's own tokens where its operands have them and it works token by token."""
        self.now[node] = self.whole[node]
        if not any(self._has_rows(source) for source in node.all_input_nodes):
            return
        wanted = self._with_rows(node)
        found = layout_or_problem(self.program, node, self.now, self.inferrer)
        if wanted is not None and not isinstance(found, str) and found[0] == wanted:
            takes = [(source, want) for source, want in found[1] if self.now[source] != want]
            if all(want == self._source_with_rows(source) for source, want in takes):
                for source, want in takes:
                    self.rewriter.provide(node, source, want)
                self.now[node] = wanted
                return
        self._give_whole(node)

    def _give_whole(self, node: fx.Node) -> None:
        for source in list(node.all_input_nodes):
            if source in self.whole and self._has_rows(source) and isinstance(self.whole[source], Layout):
                self.rewriter.provide(node, source, self.whole[source])

    def _read_whole_size(self, node: fx.Node) -> None:
        """A number of tokens stays that of all ranks of the axis."""
        if operation(node) is not aten.sym_size:
            return
        source: Any = node.args[0]
        if source in self.whole and self._has_rows(source) and node.meta["val"] == self.symbol:
            dim = self._tokens(source.meta["val"])
            assert dim is not None
            node.replace_input_with(source, self._with_all(self.whole[source].dims[dim]))
            node.args = (node.args[0], self._tokens(node.args[0].meta["val"]))  # type: ignore[union-attr]

    def _with_all(self, tokens: Any) -> fx.Node:
        """The first value with the tokens of all ranks of the axis: an input, or what was taken of it."""
        for node in self.program.graph.nodes:
            dim = self._tokens(node.meta["val"]) if isinstance(node.meta.get("val"), Value) else None
            if dim is not None and node in self.whole and self.whole[node].dims[dim] == tokens:
                found: fx.Node = node
                return found
        raise LayoutError(f"no input of {self.program.name} has {self.symbol} tokens")

    def _dealt(self, tokens: Any) -> Rows | None:
        """What sharing out tokens makes of them, which may be a rank's own of another axis already."""
        if tokens is None:
            return Rows((self.axis,), KIND)
        is_other = isinstance(tokens, Rows) and tokens.kind == KIND and self.axis not in tokens.axes
        return tokens.again((self.axis,), KIND) if is_other else None

    def _tokens(self, value: Any) -> int | None:
        """The one dim that runs over tokens, and over nothing else."""
        dims = [i for i, size in enumerate(value.shape) if size == self.symbol]
        merged = [size for size in value.shape if size != self.symbol and self.symbol in symbols_of(size)]
        return dims[0] if len(dims) == 1 and not merged else None

    def _with_rows(self, node: fx.Node) -> Any:
        """Its layout with a rank's own tokens; None where it has no dim of tokens."""
        several = self.whole[node] if isinstance(self.whole[node], tuple) else (self.whole[node],)
        found = []
        for value, layout in zip(node_values(node), several, strict=True):
            dim = self._tokens(value)
            rows = None if dim is None else self._dealt(layout.dims[dim])
            if dim is None or rows is None or self.axis in layout.axes | layout.partial:
                return None
            found.append(layout.with_dim(dim, rows))
        return tuple(found) if isinstance(self.whole[node], tuple) else found[0]

    def _source_with_rows(self, source: fx.Node) -> Any:
        """What taking a rank's own tokens makes of a value that has all; None where that cannot be."""
        if source.op == "get_attr" or not isinstance(self.whole.get(source), Layout):
            return None
        return self._with_rows(source)

    def _has_rows(self, node: Any) -> bool:
        layout = self.now.get(node)
        return any(
            isinstance(dim, Rows) and dim.last_axes == (self.axis,) and dim.kind == KIND
            for each in (layout if isinstance(layout, tuple) else (layout,))
            if each
            for dim in each.dims
        )
