"""Emit: one Program for all ranks becomes a RankProgram for one of them.

    graph     Local("heads_0") -> the integers at the rank's coordinates
    weights   a Layout -> the ranges of the source tensor, and where they go in the local one

Ranks whose rows of the table are equal share one graph; that one graph serves many ranks follows GSPMD's single
program (arXiv:2105.04663, section 3.3).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
from torch import fx

from partitioner.errors import CaptureError, LayoutError
from partitioner.program.program import Input, PerRankInt, Program, State, Weight
from partitioner.program.torch_calls import lower
from partitioner.sharding.index_set import IndexSet
from runtime.program.rank_program import RankProgram, RunInput
from runtime.program.shards import Made, Piece, StateShard, WeightShard

__all__ = ["Emitter", "Piece", "RankProgram", "RunInput", "StateShard", "WeightShard", "emit"]


def emit(program: Program, coordinates: Mapping[str, int]) -> RankProgram:
    """The program of the rank at `coordinates`; for several ranks, an Emitter does the common work once."""
    return Emitter(program).rank(coordinates)


class Emitter:
    """Emits the ranks of one program, which must not change meanwhile."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._graphs: dict[tuple[Any, ...], fx.Graph] = {}
        self._inputs = tuple(_run_input(program, given) for given in program.inputs)
        used = {node.target: None for node in program.graph.nodes if node.op == "get_attr" and node.users}
        self._weights = [_weight(program, str(name)) for name in used]

    def rank(self, coordinates: Mapping[str, int]) -> RankProgram:
        # every axis, in the mesh's order
        coordinates = self.program.mesh.coordinates(self.program.mesh.rank(coordinates))
        return RankProgram(
            build_graph=functools.partial(self._graph, coordinates),
            mesh=self.program.mesh,
            coordinates=coordinates,
            weights=tuple(weight_shard(self.program, weight, coordinates) for weight in self._weights),
            inputs=self._inputs,
            eos_token_id=self.program.eos_token_id,
            generation=self.program.generation,
            states=tuple(_state_shard(self.program, state, coordinates) for state in self.program.states.values()),
            **_vocabulary(self.program),
            limits=self.program.limits,
            values=self.program.values,
            source=None if self.program.origins is None else self.program.origins.source,
        )

    def _graph(self, coordinates: Mapping[str, int]) -> fx.Graph:
        table = self.program.table
        row = tuple(self.program.at(PerRankInt(name), coordinates) for name in table)
        if row not in self._graphs:
            integers = dict(zip(table, row, strict=True))
            self._graphs[row] = _substituted(self.program.graph, integers)
        return self._graphs[row]


def _substituted(graph: fx.Graph, integers: Mapping[str, Any]) -> fx.Graph:
    """A copy of `graph` with every stand-in replaced, lowered for execution."""
    copy = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    found = False

    def replace(leaf: Any) -> Any:
        nonlocal found
        if not isinstance(leaf, PerRankInt):
            return leaf
        found = True
        return _integers(integers, leaf.name)

    for node in graph.nodes:
        # a tied name's placeholder, say: no rank loads it
        if node.op == "get_attr" and not node.users:
            continue
        new = copied[node] = copy.node_copy(node, copied.__getitem__)
        if node.op == "call_function":
            found = False
            args, kwargs = fx.node.map_aggregate((new.args, new.kwargs), replace)
            if found:
                new.args, new.kwargs = args, kwargs
            copied[node] = lowered = lower(new)
            if lowered is not new:
                copy.erase_node(new)
    return copy


def _integers(integers: Mapping[str, Any], name: str) -> Any:
    if name not in integers:
        raise LayoutError(f"the graph names the integer {name!r}, but the program's table has no such row")
    value = integers[name]
    return list(value) if isinstance(value, tuple) else value


def weight_shard(program: Program, weight: Weight, coordinates: Mapping[str, int]) -> WeightShard:
    """Which ranges of `weight` the rank at `coordinates` holds, and where they lie in its local tensor."""
    layout = program.weight_layouts.get(weight.name)
    indices: tuple[IndexSet | None, ...] = (None,) * len(weight.shape)
    if layout is not None:
        if layout.partial or len(layout.dims) != len(weight.shape):
            raise LayoutError(f"weight {weight.name!r} of shape {list(weight.shape)} cannot have the layout {layout}")
        indices = tuple(
            None if split is None else split.owned[program.mesh.index(split.axes, coordinates)] for split in layout.dims
        )
    for dim, (size, owned) in enumerate(zip(weight.shape, indices, strict=True)):
        if owned is not None and owned.intervals and owned.intervals[-1][1] > size:
            raise LayoutError(f"weight {weight.name!r}: {owned} of dim {dim} lies outside its {size} indices")
    local_shape = tuple(size if own is None else own.size for size, own in zip(weight.shape, indices, strict=True))
    made = None
    if weight.of is not None and weight.make is not None:
        # all of it, whatever the rank holds of what is made from it
        made = Made(weight_shard(replace(program, weight_layouts={}), weight.of, coordinates), weight.make)
    shard = WeightShard(
        weight.name, weight.dtype, weight.shape, local_shape, indices, weight.source, weight.aliases, (), made
    )
    if program.origins is not None and weight.source == "checkpoint":
        return replace(shard, pieces=program.origins.of(shard))
    return replace(shard, pieces=shard.own_pieces)


def _state_shard(program: Program, state: State, coordinates: Mapping[str, int]) -> StateShard:
    shape = tuple(
        size if split is None else split.owned[program.mesh.index(split.axes, coordinates)].size
        for size, split in zip(state.shape, state.layout.dims, strict=True)
    )
    return StateShard(state.name, shape, state.dtype, state.sees, state.per_token)


def _vocabulary(program: Program) -> dict[str, Any]:
    """How large the vocabulary is and which rank holds what of it, where the program continues sequences."""
    if not program.states:
        return {}
    (logits,) = program.graph.output_node().all_input_nodes
    split = None if program.output is None else program.output.dims[-1]
    return {"vocab_size": int(logits.meta["val"].shape[-1]), "vocabulary": None if split is None else split.owned}


def _weight(program: Program, name: str) -> Weight:
    if name not in program.weights:
        raise CaptureError(f"the graph uses the weight {name!r}, which the program does not describe")
    return program.weights[name]


def _run_input(program: Program, given: Input) -> RunInput:
    names = {symbol: name for name, symbol in program.symbols.items()}
    dims: list[int | str] = []
    for dim in given.value.shape:
        if isinstance(dim, (int, sympy.Integer)):
            dims.append(int(dim))
        elif dim in names:
            dims.append(names[dim])
        else:
            known = ", ".join(program.symbols)
            raise CaptureError(f"input {given.name!r} has a dim of {dim}; required: a whole number or one of {known}")
    return RunInput(given.name, given.value.dtype, tuple(dims), given.default, given.bound)
