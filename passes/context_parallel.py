"""The context-parallel pass: the tokens of a sequence are divided among the ranks of sp; each computes its own.

    input_ids[B, S]                 -> take_rows         -> [B, S_i]     all that works token by token: own tokens
    attention(q, k, v)              -> sequence_attention(q, k, v, S)    own queries, the keys of all ranks
    logits[B, S_i, V]               -> collect_rows      -> [B, S, V]

Tokens lie in zig-zag order (`runtime/ops/rows/token_order.py`), without padding. Keys and values reach queries in one
way, the same for all layers: "ring" (arXiv:2310.01889), "gather" (arXiv:2407.21783, section 3.3.2), "ulysses"
(arXiv:2309.14509), or "ring-ulysses", over two factors of sp (arXiv:2405.07719). No other op may mix tokens: the pass
refuses a node that does, by name.

Positions, masks and other values that derive from inputs and not from trained weights are computed for the tokens that
need them: for all tokens where a mask covers keys, for a rank's own elsewhere.

Experts take a rank's own tokens where tokens are sent to them, or where the ranks that work together have the same
tokens. Elsewhere (experts, or parts of their matrices, are divided over sp itself) they get the tokens of all ranks,
and the sums are scattered: collect_rows -> experts -> scatter_rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from partitioner.analysis.cost.attention_exchange import choose_exchange, neighbours_of
from partitioner.analysis.layouts.dealt_experts import expert_bodies
from partitioner.analysis.layouts.infer_layout import FILLED, Layouts
from partitioner.analysis.layouts.memoise import Inferrer
from partitioner.analysis.layouts.own_tokens import (
    has_own,
    rows_of,
    summed_by_experts,
    tokens_dim,
    with_own,
    works_row_by_row,
)
from partitioner.analysis.stages.order_nodes import sizes_from_inputs
from partitioner.compile.insert_collectives import OVER_AXES, Rewriter, over_other_axes
from partitioner.errors import PlanError
from partitioner.program.node_arguments import arguments, describe, map_nodes, node_values, operation, symbols_of
from partitioner.program.plan import SP_ATTENTION
from partitioner.program.program import Entry, Program
from partitioner.proof.layouts import SPECIAL, infer_layouts, layout_or_problem
from partitioner.sharding.layout import Layout, Rows
from runtime.ops.attention import attention
from runtime.ops.rows import collect_rows
from runtime.ops.rows.sequence_attention import sequence_attention

__all__ = ["ContextParallel"]

KIND, ORDER = "sequence", "zigzag"
aten = torch.ops.aten
_VIEWS = (aten.view, aten.reshape, aten._unsafe_view)


@dataclass(frozen=True)
class ContextParallel:
    """See the module's docstring.

    - attention: how keys and values reach queries; "auto": the ring or Ulysses, whichever is estimated to be faster.
    - neighbours: how many ranks exchange heads in "ring-ulysses"; None: as many as there are heads for.
    - axis: the mesh axis over which tokens are divided.
    """

    name: ClassVar[str] = "context-parallel"
    attention: str = "auto"
    neighbours: int | None = None
    axis: str = "sp"

    def __post_init__(self) -> None:
        if self.attention not in SP_ATTENTION:
            raise PlanError(
                f"context-parallel: attention must be one of {', '.join(SP_ATTENTION)}; got {self.attention!r}"
            )

    def run(self, program: Program) -> Program:
        if program.mesh.size(self.axis) == 1:
            return program
        if KIND not in program.symbols:
            raise PlanError(
                f"{self.axis}={program.mesh.size(self.axis)}: {program.name} was captured for one length only: its "
                "tokens cannot be dealt out"
            )
        attends = [node for node in program.graph.nodes if node.target is attention]
        how, why = self.attention, "by the plan"
        if how == "auto":
            how, why = choose_exchange(program, attends, self.axis)
        neighbours = self._neighbours(program, attends) if how == "ring-ulysses" else 1
        _Deal(program, self.axis, how, neighbours).run()
        program.notes.append(
            f"tokens over {self.axis} in {program.mesh.size(self.axis)} zig-zag parts, {len(attends)} attentions by "
            f"{how}: {why}"
        )
        return program

    def _neighbours(self, program: Program, attends: list[fx.Node]) -> int:
        ranks = program.mesh.size(self.axis)
        found = self.neighbours or neighbours_of(attends, ranks)
        if found is None or not 1 < found < ranks or ranks % found:
            raise PlanError(
                f"{self.axis}={ranks}, ring-ulysses: {found or 'no number of'} ranks that exchange heads: required is "
                f"a factor of {ranks}, not 1 or {ranks}, and no more than a rank has query heads; give ring or gather"
            )
        masked = next((node for node in attends if arguments(node)["mask"] is not None), None)
        if masked is not None:
            raise PlanError(
                f"{self.axis}={ranks}: {describe(masked)} (node {masked.name!r}) adds a mask, which ring-ulysses does "
                "not take: give ring, gather or ulysses"
            )
        return found


class _Deal:
    def __init__(self, program: Program, axis: str, how: str, neighbours: int) -> None:
        self.program, self.axis, self.how, self.neighbours = program, axis, how, neighbours
        self.symbol = program.symbols[KIND]
        self.rows = Rows((axis,), KIND, ORDER)
        self.whole: Layouts = {}
        """How each value was held, before its tokens were dealt out."""
        self.now: Layouts = {}
        self.rewriter = Rewriter(program, self.now)
        self.inferrer = Inferrer(program)
        self.of_inputs: set[fx.Node] = set()
        """Values made of inputs, sizes and buffers: cheap, and computed for whichever tokens are asked for."""
        self.own: dict[fx.Node, fx.Node] = {}
        """Of such a value, or of a number of tokens: that of the rank's own tokens."""
        self.kept: set[fx.Node] = set()
        """Experts that need the tokens of all ranks."""
        self.summed = summed_by_experts(axis)

    def run(self) -> None:
        sizes_from_inputs(self.program)
        nodes = list(self.program.graph.nodes)
        self.whole = infer_layouts(self.program, self.inferrer)
        for node in nodes:
            if node in self.whole and self._is_of_inputs(node):
                self.of_inputs.add(node)
        for body in expert_bodies(self.program, self.whole):
            if not body.takes_own(self.axis):
                self.kept |= body.nodes
        for node in nodes:
            if node.op == "output":
                self._give_whole(node)
            elif node in self.whole:
                self._place(node)
                node.meta["layout"] = self.now[node]
        self.program.graph.eliminate_dead_code()
        self.program.graph.lint()

    def _is_of_inputs(self, node: fx.Node) -> bool:
        """Whether a value is made of inputs, sizes and buffers; of its operands that is known."""
        if node.op == "placeholder":
            return True
        if node.op == "get_attr":
            return self.program.weights[str(node.target)].source in ("computed", "constant")
        # what is filled reads the dtype of an operand, and no values
        return operation(node) in FILLED or all(n in self.of_inputs or not node_values(n) for n in node.all_input_nodes)

    def _place(self, node: fx.Node) -> None:
        self.now[node] = self.whole[node]
        if node in self.of_inputs:
            return
        if node in self.kept:
            self._keep(node)
        elif node.target is attention:
            self._attend(node)
        elif node.target in OVER_AXES and self._has_rows(own := self._own(node.all_input_nodes[0])):
            self._narrow(node, own)
        elif self._takes_rows(node):
            return
        elif any(self._has_rows(source) for source in node.all_input_nodes):
            raise self._refused(node, self._why(node))

    def _refused(self, node: fx.Node, why: str) -> PlanError:
        return PlanError(
            f"{self.axis}={self.program.mesh.size(self.axis)}: {self.program.name} cannot have its tokens dealt out: "
            f"{describe(node)} (node {node.name!r}) {why}; only attention may look from one token at another"
        )

    def _takes_rows(self, node: fx.Node) -> bool:
        """Makes `node` work on own tokens, if it works token by token."""
        before = node.args, node.kwargs
        own = {source: self._own(source) for source in node.all_input_nodes}
        if not any(self._has_rows(source) for source in own.values()):
            return False
        node.args, node.kwargs = map_nodes(before, own.__getitem__)
        found = self._token_by_token(node, self.whole[node])
        if found is None:
            node.args, node.kwargs = before
            return False
        self.now[node] = found
        self._spell_out(node)
        return True

    def _token_by_token(self, node: fx.Node, whole: Any) -> Any:
        """What it yields of own tokens, if it works on each by itself and on its operands as they are."""
        found = layout_or_problem(self.program, node, self.now, self.inferrer)
        if isinstance(found, str) or any(self.now[n] != want for n, want in found[1]):
            return None
        alike = works_row_by_row(node, found[0], whole, self.rows, self.symbol, self.summed)
        return found[0] if alike else None

    def _spell_out(self, node: fx.Node) -> None:
        """A size left to be found out, -1, cannot be found where a rank has no tokens."""
        if operation(node) not in _VIEWS:
            return
        sizes = list(node.args[1])  # type: ignore[arg-type]
        dim = sizes.index(-1) if -1 in sizes else None
        if dim is None or not isinstance(size := node.meta["val"].shape[dim], int):
            return
        split = self.now[node].split(dim)
        entry = Entry(size, split.axes, split.sizes) if split is not None else Entry(size, (), (size,))
        sizes[dim] = self.program.local("size", entry)
        node.args = (node.args[0], sizes)

    def _own(self, source: fx.Node) -> fx.Node:
        """The same of own tokens, of what is made of inputs or is a number of tokens; else itself."""
        if source in self.own:
            return self.own[source]
        found = source
        if source in self.kept:
            found = self._leaving(source)
        elif not node_values(source):
            found = self._own_number(source)
        elif source in self.of_inputs and source.op != "get_attr":
            wanted = self._with_rows(source)
            copied = None if wanted is None else self._own_copy(source, wanted)
            if copied is not None:
                found = copied
            elif isinstance(wanted, Layout) and self.symbol in source.meta["val"].shape:
                found = self.rewriter.converted(source, wanted)
        self.own[source] = found
        return found

    def _own_number(self, number: fx.Node) -> fx.Node:
        """A number of own tokens, times what does not depend on tokens."""
        value = number.meta.get("val")
        if number.op != "call_function" or self.symbol not in symbols_of(value):
            return number
        if self.symbol in symbols_of(sympy.simplify(value / self.symbol)):
            return number  # no number of tokens: what reads it is refused
        own = {source: self._own(source) for source in number.all_input_nodes}
        if all(source is other for source, other in own.items()):
            return number
        return self._copy(number, own)

    def _own_copy(self, source: fx.Node, wanted: Layout) -> fx.Node | None:
        """`source` made anew of own tokens, if it works token by token."""
        if source.op != "call_function":
            return None
        own = {n: self._own(n) for n in source.all_input_nodes}
        if all(n is other for n, other in own.items()):
            return None
        made = self._copy(source, own)
        if self._token_by_token(made, self.whole[source]) != wanted:
            self.program.graph.erase_node(made)
            return None
        self.now[made] = made.meta["layout"] = wanted
        self._spell_out(made)
        return made

    def _copy(self, node: fx.Node, operands: dict[fx.Node, fx.Node]) -> fx.Node:
        with self.program.graph.inserting_after(_latest([node, *operands.values()])):
            made = self.program.graph.node_copy(node, lambda n: operands.get(n, n))
        made.meta = {key: value for key, value in node.meta.items() if key != "layout"}
        return made

    def _attend(self, node: fx.Node) -> None:
        """Own queries look at the keys of all ranks."""
        a = arguments(node)
        for name in ("q", "k", "v"):
            layout = self.now[a[name]]
            if layout.dims[2] != self.rows:
                raise self._refused(node, f"has the {_NAMES[name]} {layout}, not one for each token")
        operands = [a["q"], a["k"], a["v"], self.rewriter.whole_size(self.symbol, node)]
        operands += [self._mask(a["mask"]), a["sinks"]]
        how: Any = {"how": self.how, "parts": self.program.mesh.size(self.axis), "order": ORDER}
        how |= {"neighbours": self.neighbours} if self.neighbours > 1 else {}
        options = {name: value for name, value in node.kwargs.items() if name not in (*_NAMES, "written_out")}
        node.target, node.args, node.kwargs = sequence_attention, (*operands, self.axis), {**how, **options}
        self.now[node] = self.whole[node].with_dim(2, self.rows)
        node.meta["why"] = f"own queries look at the keys of all ranks of {self.axis}, by {self.how}"

    def _mask(self, mask: Any) -> Any:
        """Of all keys; of own queries, or of all where heads are exchanged for tokens."""
        if not isinstance(mask, fx.Node):
            return mask
        shape, wanted = mask.meta["val"].shape, self.whole[mask]
        if self.how != "ulysses" and len(shape) > 1 and shape[-2] == self.symbol:
            wanted = wanted.with_dim(len(shape) - 2, self.rows)
        return self.rewriter.converted(mask, wanted)

    # -- experts -------------------------------------------------------------------------------------------------------

    def _keep(self, node: fx.Node) -> None:
        """The tokens of all ranks, as before."""
        for source in list(node.all_input_nodes):
            if source not in self.kept and self._has_rows(source):
                self.rewriter.provide(node, source, Layout(self.whole[source].dims, self.now[source].partial))

    def _leaving(self, source: fx.Node) -> fx.Node:
        """Own tokens of what was computed of those of all, summed over ranks that have others."""
        layout, dim = self.whole[source], tokens_dim(source.meta["val"].shape, self.symbol)
        if not isinstance(layout, Layout) or dim is None or (own := rows_of(layout.dims[dim], self.rows)) is None:
            return source
        if self.axis in layout.partial:
            return self.rewriter.scattered(source, dim, own)
        return self.rewriter.converted(source, Layout(layout.dims, layout.partial - self.summed).with_dim(dim, own))

    def _narrow(self, node: fx.Node, own: fx.Node) -> None:
        """`node` over those of its axes whose ranks have the same tokens; nothing where there are none."""
        total = arguments(node)["total"] if node.target is collect_rows else None
        if isinstance(total, fx.Node):
            total = self._own(total)
        if over_other_axes(self.program, node, own, self.summed, total=total):
            self.now[node] = SPECIAL[node.target](self.program, node, self.now)
        else:
            node.replace_all_uses_with(own)
            self.now[node] = self.now[own]

    def _give_whole(self, node: fx.Node) -> None:
        for source in list(node.all_input_nodes):
            if self._has_rows(source):
                self.rewriter.provide(node, source, self.whole[source])

    # -- layouts -------------------------------------------------------------------------------------------------------

    def _with_rows(self, node: fx.Node) -> Any:
        """Its layout with own tokens; None where it has no dim of tokens, or several."""
        several = self.whole[node] if isinstance(self.whole[node], tuple) else (self.whole[node],)
        values = zip(node_values(node), several, strict=True)
        found = [with_own(value.shape, layout, self.rows, self.symbol) for value, layout in values]
        if None in found:
            return None
        return tuple(found) if isinstance(self.whole[node], tuple) else found[0]

    def _has_rows(self, node: fx.Node) -> bool:
        return has_own(self.now.get(node), self.rows)

    def _why(self, node: fx.Node) -> str:
        found = layout_or_problem(self.program, node, self.now, self.inferrer)
        if isinstance(found, str):
            return found
        return "reads the rows of all tokens, or has no row for each in its result"


_NAMES = {"q": "queries", "k": "keys", "v": "values", "mask": "mask", "sinks": "sinks"}


def _latest(nodes: list[fx.Node]) -> fx.Node:
    found = nodes[0]
    for node in nodes[1:]:
        if found < node:
            found = node
    return found
