"""The kv-cache pass: attention reads keys and values of earlier tokens from a cache instead of computing them again.

    attention(q, k, v, causal=True)   ->   cached_attention(q, k, v, positions, state="model.layers.0.self_attn")

Which positions a query may see says everything, so one graph serves a prompt (S tokens), part of a prompt, and one
token. A layer's cache holds the heads that the rank computes: a split one is sized by the local heads. Layers that see
no further than a window or a chunk say so, and keep no more. Key-value caching: arXiv:1911.02150, section 2.

Where ranks share out a sequence, each keeps its part of the cache: a prompt's own tokens (`sequence_attention`), and of
tokens that come one by one each its turn (attention, whose parts are merged).

A graph that is right for up to n tokens at once says nothing of longer texts, also in pieces: beyond n the model's own
code may do something else, such as attend to a summary of every n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from partitioner.compile.insert_collectives import Rewriter
from partitioner.program.node_arguments import arguments
from partitioner.program.program import Program, State, Value
from partitioner.sharding.layout import REPLICATED, Layout, Rows
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention
from runtime.ops.rows.sequence_attention import cached_sequence_attention, sequence_attention
from runtime.ops.rows.share_rows import take_rows

__all__ = ["KvCache"]

_POSITIONS, _AXIS = "position_ids", "sp"


@dataclass(frozen=True)
class KvCache:
    """Runs after the pass that splits heads, on a program whose tokens meet in causal attention only."""

    name: ClassVar[str] = "kv-cache"

    def run(self, program: Program) -> Program:
        # attention that is not causal by itself reads what a graph for single steps has appended and masked already
        nodes = [
            n for n in program.graph.nodes if n.target in (attention, sequence_attention) and arguments(n)["causal"]
        ]
        takes_steps = bool(program.states)  # with the model's own cache: it is right for any text already
        # made where the model itself has no use for it
        tokens = next(iter(program.graph.nodes)).meta["val"]
        positions = program.add_input(_POSITIONS, Value(tokens.shape, torch.int64), "arange")
        for node in nodes:
            self._cache(program, node, positions)
        if not takes_steps:
            known = [program.limits.get(size, (1, None))[1] for size in ("sequence", "positions")]
            longest = min((most for most in known if most is not None), default=None)
            program.limits = {**program.limits, "positions": (1, longest)}
        program.graph.lint()
        return program

    def _cache(self, program: Program, node: fx.Node, positions: fx.Node) -> None:
        a = arguments(node)
        axes = (_AXIS,) if program.mesh.size(_AXIS) > 1 else ()
        name = str(node.meta.get("path") or node.name)
        if f"{name}.key" in program.states:  # a module that attends twice
            name = f"{name}.{node.name}"
        sees = min((a[limit] for limit in ("window", "chunk") if a[limit] is not None), default=None)
        for operand, part in (("k", "key"), ("v", "value")):
            source = a[operand]
            value, layout = source.meta["val"], source.meta.get("layout") or REPLICATED(4)
            state = State(
                f"{name}.{part}",
                (value.shape[1], value.shape[3]),
                value.dtype,
                Layout((layout.dims[1], layout.dims[3])),
                sees,
                token_axes=axes,
            )
            program.states[state.name] = state
        mask, sinks = a["mask"], a["sinks"]
        options = {k: v for k, v in node.kwargs.items() if k not in ("mask", "sinks")}
        if not axes:
            node.target = cached_attention
            node.args = (a["q"], a["k"], a["v"], positions, *(() if mask is sinks is None else (mask, sinks)))
        else:
            if node.target is attention:
                how: Any = {"how": "merge", "parts": program.mesh.size(_AXIS)}
                options = {**how, **{k: v for k, v in options.items() if k != "written_out"}}
            node.target = cached_sequence_attention
            node.args = (a["q"], a["k"], a["v"], _of_queries(program, a["q"], positions), mask, sinks, _AXIS)
        node.kwargs = {**options, "state": name}
        far = "all earlier tokens" if sees is None else f"the last {sees} tokens"
        where = f", a part of which each rank of {_AXIS} keeps" if axes else ""
        node.meta["why"] = f"keys and values of {far} come from the cache{where}"


def _of_queries(program: Program, q: fx.Node, positions: fx.Node) -> fx.Node:
    """The positions of a rank's own queries."""
    rows = (q.meta.get("layout") or REPLICATED(4)).dims[2]
    if not isinstance(rows, Rows):
        return positions
    layouts = {node: node.meta["layout"] for node in program.graph.nodes if isinstance(node.meta.get("layout"), Layout)}
    wanted = REPLICATED(2).with_dim(1, rows)
    for user in positions.users:
        if user.target is take_rows and layouts.get(user) == wanted:
            return user
    return Rewriter(program, {**layouts, positions: REPLICATED(2)}).converted(positions, wanted)
