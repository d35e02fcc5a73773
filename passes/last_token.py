"""The last-token pass: the logits of each sequence's last token only, and each rank keeps its part of the vocabulary.

    hidden[B, S, H] -> lm_head -> logits[B, S, V]     ->     last_token(hidden, last)[B, 1, H] -> logits[B, 1, V/n]

`last` [B] is the index of each row's last token. A prompt of 8192 tokens over a vocabulary of 128256 would otherwise
yield 4 GB of float32 logits, of which generation reads one row. The all-gather of vocabulary-parallel logits is
removed: the sampler reads each rank's part (as Megatron-LM does for its loss, arXiv:1909.08053, section 3).

Where ranks have tokens of their own, one rank has the last one: hidden[B, S_i, H] -> own_last_token -> all_reduce.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from partitioner.compile.insert_collectives import Rewriter
from partitioner.program.node_arguments import operation, symbols_of
from partitioner.program.program import Entry, Program, Value
from partitioner.sharding.layout import REPLICATED, Layout, Rows
from runtime.ops.cached_attention import last_token
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.communicating import axis_argument
from runtime.ops.local import reorder
from runtime.ops.rows.share_rows import collect_rows, own_last_token

aten = torch.ops.aten

__all__ = ["LastToken"]

_ROW_BY_ROW = {
    aten.linear, aten.add, aten.sub, aten.mul, aten.div, aten.tanh, aten.to, aten._to_copy, aten.neg,
    all_reduce, all_gather, reorder,
}  # fmt: skip
"""Ops that may stand between the last hidden state and the logits: each row of the result comes from one row."""


@dataclass(frozen=True)
class LastToken:
    """Runs after the pass that splits the vocabulary. Adds the input `last`."""

    name: ClassVar[str] = "last-token"

    def run(self, program: Program) -> Program:
        output = program.graph.output_node()
        (logits,) = output.all_input_nodes
        if logits.target is collect_rows and logits.kwargs["dim"] == 1:
            # of one token each there are no rows to collect
            (rows,) = [source for source in logits.all_input_nodes if isinstance(source.meta["val"], Value)]
            output.replace_input_with(logits, rows)
            program.graph.erase_node(logits)
            (logits,) = output.all_input_nodes
        if "sequence" not in program.symbols:  # a graph for one token at a time
            _keep_parts(program)
            program.graph.eliminate_dead_code()
            return program
        place = _pick(program, logits)
        value = place.meta["val"]
        last = program.add_input("last", Value((value.shape[0],), torch.int64), "required")
        picked = _of_each(program, place, last)
        node = picked
        while node is not output:
            (node,) = node.users
            if isinstance(node.meta.get("val"), Value):
                shape = node.meta["val"].shape
                node.meta = {**node.meta, "val": Value((shape[0], 1, shape[2]), node.meta["val"].dtype)}
                if "layout" in node.meta:
                    node.meta["layout"] = _of_one_token(node.meta["layout"])
        _keep_parts(program)
        program.graph.eliminate_dead_code()
        program.graph.lint()
        return program


def _of_each(program: Program, place: fx.Node, last: fx.Node) -> fx.Node:
    """The row of each sequence's last token, in the place of `place` for all its users."""
    layout = place.meta.get("layout") or REPLICATED(3)
    if isinstance(shared := layout.dims[1], Rows) and shared.of is not None:
        layouts = {node: node.meta["layout"] for node in program.graph.nodes if "layout" in node.meta}
        taken, layout = place, layout.with_dim(1, shared.of)
        place = Rewriter(program, layouts).converted(taken, layout)
        taken.replace_all_uses_with(place, delete_user_cb=lambda user: user is not place)
    value = place.meta["val"]
    users = list(place.users)
    meta = {
        **place.meta,
        "val": Value((value.shape[0], 1, value.shape[2]), value.dtype),
        "why": "logits are only needed of each sequence's last token",
        "layout": _of_one_token(layout),
    }
    rows = layout.dims[1]
    with program.graph.inserting_before(_next(place)):
        if not isinstance(rows, Rows):
            picked = program.graph.call_function(last_token, (place, last))
        else:
            parts = program.mesh.size(*rows.axes)
            index = program.local("row_index", Entry(0, rows.axes, tuple(range(parts))))
            total = Rewriter(program, {}).whole_size(value.shape[1], place)
            options: Any = {"parts": parts, "axes": list(rows.axes), "order": rows.order}
            given: Any = (place, last, total, index)
            own = program.graph.call_function(own_last_token, given, options)
            partial = _of_one_token(layout)
            own.meta = {**meta, "layout": Layout(partial.dims, partial.partial | set(rows.axes))}
            picked = program.graph.call_function(all_reduce, (own, axis_argument(rows.axes)))
    picked.meta = meta
    for user in users:
        user.replace_input_with(place, picked)
    return picked


def _of_one_token(layout: Layout) -> Layout:
    return layout.with_dim(1, None)


def _pick(program: Program, logits: fx.Node) -> fx.Node:
    """The earliest value [B, S, H] from which on every op works row by row."""
    node = logits
    while node.op == "call_function" and operation(node) in _ROW_BY_ROW:
        rows = [n for n in node.all_input_nodes if _is_per_token(program, n)]
        if (
            len(rows) != 1
            or len(rows[0].users) != 1
            or len(rows[0].meta["val"].shape) != 3
            or node.args[0] is not rows[0]
        ):
            break
        (node,) = rows
    return node


def _is_per_token(program: Program, node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Value):
        return True  # an integer such as the length: not something to look behind
    return any(program.symbols["sequence"] in symbols_of(size) for size in value.shape)


def _next(node: fx.Node) -> fx.Node:
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def _keep_parts(program: Program) -> None:
    """Takes out the gather of the logits, and says how they are held."""
    output = program.graph.output_node()
    (node,) = output.all_input_nodes
    while node.target is reorder or node.target is all_gather:
        source = node.all_input_nodes[0]
        if node.target is all_gather:
            if node.kwargs["dim"] not in (2, -1):
                return
            layout: Layout = source.meta["layout"]
            output.replace_input_with(output.all_input_nodes[0], source)
            program.output = layout
            return
        node = source
