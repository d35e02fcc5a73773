"""Emit: one Program for all ranks becomes a RankProgram for one of them.

    graph     Local("heads_0") -> the integers at the rank's coordinates
    weights   a Layout -> the ranges of the source tensor, and where they go in the local one

Ranks that differ only along axes that nothing is divided over (replicas) share all of it; ranks whose rows of the table
are equal share one graph. That one graph serves many ranks follows GSPMD's single program (arXiv:2105.04663, section
3.3).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from partitioner.compile.cut_stages import StageParts
from partitioner.errors import LayoutError
from partitioner.program.copy_nodes import append_node
from partitioner.program.pause_collector import collector_paused
from partitioner.program.program import HeldForm, PerRankInt, Program, State, Weight
from partitioner.program.progress import timed
from partitioner.program.stages import crossings
from partitioner.program.torch_calls import lower, lowered_call
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import in_order
from partitioner.storage.checkpoint.stored_graph import stored_forms, use_stored
from runtime.program.rank_program import RankProgram, RunInput, SharedHead
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
        self._differing: dict[int, set[fx.Node]] = {}
        """By stage, the nodes that hold integers of ranks."""
        pp = program.mesh.size("pp")
        # on a mesh without stages the program is run whole, as whoever looks for a difference does
        count = program.stages.count if program.stages is not None and pp > 1 else 1
        layouts = [*program.weight_layouts.values(), *(state.layout for state in program.states.values())]
        self._axes = in_order(
            (
                *(("pp",) if count > 1 else ()),
                *(axis for entry in program.table.values() for axis in entry.axes),
                *(axis for layout in layouts for axis in layout.axes),
            )
        )
        """Those along which ranks differ."""
        self._parts: dict[tuple[int, ...], RankProgram] = {}
        if count > 1 and pp != count:
            raise LayoutError(f"the program has {count} stages, and the mesh pp={pp}")
        parts = program.stages.parts if program.stages is not None and count > 1 else 1
        cuts = crossings(program.graph, parts)
        self._stages = [StageParts.of(program, stage, count, cuts) for stage in range(parts)]
        """Of each stage; then of the head, where they share it out."""
        self._count = count
        self._stored = stored_forms(program)

    def rank(self, coordinates: Mapping[str, int]) -> RankProgram:
        # every axis, in the mesh's order
        coordinates = self.program.mesh.coordinates(self.program.mesh.rank(coordinates))
        key = tuple(coordinates[axis] for axis in self._axes)
        if key not in self._parts:
            self._parts[key] = self._rank(coordinates)
        return replace(self._parts[key], coordinates=coordinates)

    def _rank(self, coordinates: Mapping[str, int]) -> RankProgram:
        stage = self._stage(coordinates)
        parts, head = self._stages[stage], self._stages[self._count :]
        wanted = list(dict.fromkeys(weight for each in (parts, *head) for weight in each.weights))
        weights, data = rank_weights(self.program, wanted, coordinates, self._stored)
        return RankProgram(
            build_graph=functools.partial(self._graph, coordinates, stage),
            mesh=self.program.mesh,
            coordinates=coordinates,
            weights=weights,
            inputs=parts.inputs,
            eos_token_id=self.program.eos_token_id,
            states=tuple(_state_shard(self.program, state, coordinates) for state in parts.states),
            generation=self.program.generation,
            **_vocabulary(self.program),
            limits=self.program.limits,
            batch_axes=self.program.batch_axes,
            tokens_as_rows=self.program.tokens_as_rows,
            stage=parts.stage,
            shared_head=self._shared_head(coordinates, head[0]) if head else None,
            weight_data={**self.program.weight_data, **data} if data else self.program.weight_data,
            source=None if self.program.origins is None else self.program.origins.source,
        )

    def _stage(self, coordinates: Mapping[str, int]) -> int:
        """0 where the program is run whole, whatever the mesh."""
        return coordinates["pp"] if len(self._stages) > 1 else 0

    def _shared_head(self, coordinates: Mapping[str, int], parts: StageParts) -> SharedHead:
        assert parts.stage is not None
        if parts.states:
            raise LayoutError(
                f"the shared head of {self.program.name} keeps {parts.states[0].name!r}: it must keep none"
            )
        return SharedHead(functools.partial(self._graph, coordinates, self._count), parts.stage.receives)

    def _graph(self, coordinates: Mapping[str, int], stage: int) -> fx.Graph:
        table = self.program.table
        row = tuple(self.program.at(PerRankInt(name), coordinates) for name in table)
        if (stage, row) not in self._graphs:
            integers = dict(zip(table, row, strict=True))
            with timed("emit"), collector_paused():
                graph = self._stages[stage].graph
                if stage not in self._differing:
                    self._differing[stage] = _differing(graph)
                graph = _substituted(graph, integers, self._differing[stage])
                use_stored(graph, self._stored)
                self._graphs[stage, row] = graph
        return self._graphs[stage, row]


def _differing(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that hold stand-ins for integers."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        leaves: list[Any] = []
        fx.node.map_aggregate((node.args, node.kwargs), leaves.append)
        if any(isinstance(leaf, PerRankInt) for leaf in leaves):
            found.add(node)
    return found


def _substituted(graph: fx.Graph, integers: Mapping[str, Any], differing: set[fx.Node]) -> fx.Graph:
    """A copy of `graph` with every stand-in replaced, which `differing` hold, lowered for execution."""
    copy = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}

    def replace(leaf: Any) -> Any:
        return _integers(integers, leaf.name) if isinstance(leaf, PerRankInt) else leaf

    for node in graph.nodes:
        # a tied name's placeholder, say: no rank loads it
        if node.op == "get_attr" and not node.users:
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), copied.__getitem__)
        if node in differing and node.op == "call_function":
            args, kwargs = fx.node.map_aggregate((args, kwargs), replace)
        call = lowered_call(node.target, args, kwargs) if node.op == "call_function" else None
        op, target = call or (node.op, node.target)
        new = copied[node] = append_node(copy, node, op, target, args, kwargs)
        if op == "call_function" and call is None:
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
            None if split is None else split.at(program.mesh, coordinates)
            for split in map(layout.split, range(len(layout.dims)))
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


def rank_weights(
    program: Program, weights: Sequence[Weight], coordinates: Mapping[str, int], stored: Mapping[str, HeldForm]
) -> tuple[tuple[WeightShard, ...], dict[str, Tensor]]:
    """The shards of a rank, and the data of those that say which scale is whose."""
    found: list[WeightShard] = []
    data: dict[str, Tensor] = {}
    for weight in weights:
        if weight.name in stored:
            whole = replace(program, origins=None)
            shards, own = stored[weight.name].shards(weight_shard(whole, weight, coordinates))
            found += (shard for shard in shards.values() if shard is not None)
            data |= own
        else:
            found.append(weight_shard(program, weight, coordinates))
    return tuple(found), data


def _state_shard(program: Program, state: State, coordinates: Mapping[str, int]) -> StateShard:
    shape = tuple(
        size if split is None else split.at(program.mesh, coordinates).size
        for size, split in zip(state.shape, map(state.layout.split, range(len(state.shape))), strict=True)
    )
    return StateShard(state.name, shape, state.dtype, state.sees, state.per_token, state.block, state.token_axes)


def _vocabulary(program: Program) -> dict[str, Any]:
    """How large the vocabulary is and which rank holds what of it, where the program continues sequences."""
    if not program.states:
        return {}
    (logits,) = program.graph.output_node().all_input_nodes
    split = None if program.output is None else program.output.split(-1)
    found: dict[str, Any] = {"vocab_size": int(logits.meta["val"].shape[-1])}
    return found if split is None else {**found, "vocabulary": split.owned, "vocabulary_axes": split.axes}
