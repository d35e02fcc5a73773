"""The kv-cache pass: attention reads keys and values of earlier tokens from a cache instead of computing them again.

    attention(q, k, v, causal=True)   ->   cached_attention(q, k, v, positions, state="model.layers.0.self_attn")

Which positions a query may see says everything, so one graph serves a prompt (S tokens), part of a prompt, and one
token. A layer's cache holds the heads that the rank computes: a split one is sized by the local heads. Layers that see
no further than a window or a chunk say so, and keep no more. Key-value caching: arXiv:1911.02150, section 2.

A graph that is right for up to n tokens at once says nothing of longer texts, also in pieces: beyond n the model's own
code may do something else, such as attend to a summary of every n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from partitioner.program.node_arguments import arguments
from partitioner.program.program import Program, State, Value
from partitioner.sharding.layout import REPLICATED, Layout
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention

__all__ = ["KvCache"]

_POSITIONS = "position_ids"


@dataclass(frozen=True)
class KvCache:
    """Runs after the pass that splits heads, on a program whose tokens meet in causal attention only."""

    name: ClassVar[str] = "kv-cache"

    def run(self, program: Program) -> Program:
        # attention that is not causal by itself reads what a graph for single steps has appended and masked already
        nodes = [node for node in program.graph.nodes if node.target is attention and arguments(node)["causal"]]
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
            )
            program.states[state.name] = state
        node.target = cached_attention
        mask, sinks = a["mask"], a["sinks"]
        node.args = (a["q"], a["k"], a["v"], positions, *(() if mask is sinks is None else (mask, sinks)))
        node.kwargs = {**{k: v for k, v in node.kwargs.items() if k not in ("mask", "sinks")}, "state": name}
        far = "all earlier tokens" if sees is None else f"the last {sees} tokens"
        node.meta["why"] = f"keys and values of {far} come from the cache"
