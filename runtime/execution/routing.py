"""How many tokens go to which experts: counted while a graph runs, node by node.

    counts["model.layers.3.mlp.experts"]    [E], those of this rank's experts; the ranks' counts add up

Counting runs the graph through an interpreter, so that a run which is not counted costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from runtime.ops.collectives import landed
from runtime.ops.communicating import as_axes
from runtime.ops.expert_exchange import expert_send, localise_experts
from runtime.ops.experts import expert_dispatch
from runtime.program.rank_program import RankProgram

__all__ = ["Routing"]


class Routing:
    """The counts of one rank."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}
        """By the path of the experts in the model."""
        self.left_out: dict[str, Tensor] = {}
        """Of limited experts, choices [E] of this rank's tokens for which they had no room, once the block is over; not
        among `counts`. Ranks that have the same tokens have the same numbers."""

    def run(self, program: RankProgram, bound: fx.Graph, inputs: Sequence[Any]) -> Any:
        """What `bound`, the graph of `program`, yields; its experts' tokens are counted."""
        return _Counting(self, program, bound).run(*inputs)

    def note(self, dispatch: fx.Node, counts: Tensor, program: RankProgram) -> None:
        """`dispatch`: as it stands in the program's graph."""
        experts, total = _experts(dispatch, counts.shape[0], program)
        path = str(dispatch.meta.get("path") or dispatch.name)
        known = self.counts.setdefault(path, torch.zeros(total, dtype=torch.int64))
        known[list(experts)] += counts.cpu()


class _Counting(fx.Interpreter):
    def __init__(self, routing: Routing, program: RankProgram, bound: fx.Graph) -> None:
        super().__init__(fx.GraphModule({}, bound))
        self.routing, self.program = routing, program
        self.dispatches = {node.name: node for node in program.graph.nodes if node.target is expert_dispatch}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.target is expert_dispatch:
            self.routing.note(self.dispatches[n.name], found[2], self.program)
        return found


def _experts(dispatch: fx.Node, local: int, program: RankProgram) -> tuple[Sequence[int], int]:
    """The experts of this rank, by their numbers in the model, and how many there are."""
    index: Any = dispatch.args[1]
    while index.target is landed:
        index = index.args[0]
    route = index.args[0] if index.op == "call_function" and index.args and isinstance(index.args[0], fx.Node) else None
    if route is None or route.target not in (localise_experts, expert_send):
        return range(local), local
    options: Any = route.kwargs
    experts, counts = list(options["experts"]), list(options["counts"])
    given: Any = route.args
    if route.target is localise_experts:
        rank = given[2]
    else:
        rank = program.mesh.index(as_axes(given[3]), program.coordinates)
    start = sum(counts[:rank])
    return experts[start : start + counts[rank]], max(experts) + 1
