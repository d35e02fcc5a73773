"""Cut a program into its pipeline stages: the graph, inputs, weights and states of each, and what crosses.

    stage graph    all inputs, "receive_0" and so on for what the stage before hands on, its nodes; it yields a tuple of
                   what it hands to the next stage, or the result
    shared head    the same, for what all stages share out: it receives what the last one hands on

Inputs are given to every stage, used or not: all of them check the same, and know the sizes of what crosses.
What crosses must be complete: a partial sum would have to be completed by ranks of another stage. A rank's own tokens
cross as they are, to the rank of the next stage that has the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
from torch import fx

from partitioner.errors import CaptureError, LayoutError
from partitioner.program.program import Input, Program, State, Value, Weight
from partitioner.program.stages import stages_of
from partitioner.sharding.layout import Layout, Rows
from runtime.program.rank_program import Crossing, OwnRows, RunInput, Stage

__all__ = ["StageParts"]


@dataclass(frozen=True)
class StageParts:
    """What one stage has of a program; all of it where there is one stage."""

    graph: fx.Graph
    inputs: tuple[RunInput, ...]
    weights: tuple[Weight, ...]
    states: tuple[State, ...]
    stage: Stage | None

    @classmethod
    def of(cls, program: Program, index: int, count: int, cuts: Sequence[Sequence[fx.Node]]) -> StageParts:
        """index: of a stage; `count` for the head that they share out. cuts: what crosses behind each stage."""
        if count == 1:
            graph, stage = program.graph, None
        else:
            received = cuts[index - 1] if index else ()
            sent = cuts[index] if index < len(cuts) else ()
            graph = _cut(program.graph, index, received, sent)
            stage = Stage(
                index,
                count,
                tuple(_crossing(program, n) for n in received),
                tuple(_crossing(program, n) for n in sent),
                rows_apart=program.stages is not None and program.stages.rows_apart,
                pairs_per_token=program.stages.pairs_per_token if program.stages is not None else 0,
            )
        read = [str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users]
        used = {str(node.kwargs["state"]) for node in graph.nodes if "state" in node.kwargs}
        states = program.states.items()
        return cls(
            graph,
            tuple(_run_input(program, given) for given in program.inputs),
            tuple(_weight(program, name) for name in dict.fromkeys(read)),
            # a state of attention is named by the layer, and has a part for keys and one for values
            tuple(s for name, s in states if count == 1 or name in used or name.rpartition(".")[0] in used),
            stage,
        )


def _cut(graph: fx.Graph, stage: int, received: Sequence[fx.Node], sent: Sequence[fx.Node]) -> fx.Graph:
    """The nodes of one stage, behind what it receives; yields what it sends, or the result."""
    cut = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            copied[node] = cut.node_copy(node, copied.__getitem__)
    for i, node in enumerate(received):
        copied[node] = cut.placeholder(f"receive_{i}")
        copied[node].meta = {**node.meta, "why": f"{node.name}, from the stage before"}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_function") and stage in stages_of(node):
            copied[node] = cut.node_copy(node, copied.__getitem__)
            copied[node].name = node.name
    output = graph.output_node()
    if sent:
        made = cut.output(tuple(copied[node] for node in sent))
    else:
        made = cut.output(fx.node.map_arg(output.args[0], copied.__getitem__))
    made.meta = dict(output.meta)
    return cut


def _crossing(program: Program, node: fx.Node) -> Crossing:
    value, layout = node.meta.get("val"), node.meta.get("layout")
    if not isinstance(value, Value):
        raise LayoutError(f"{node.name!r} cannot cross to another stage: it is no tensor")
    if isinstance(layout, Layout) and (layout.partial or layout.split_dims):
        raise LayoutError(f"{node.name!r} cannot cross to another stage: it is {layout}; complete it first")
    dims = _named_dims(program, value.shape, f"the value {node.name!r}")
    rows = () if layout is None else tuple(_own_rows(program, node, layout, dims))
    return Crossing(node.name, dims, value.dtype, rows)


def _own_rows(program: Program, node: fx.Node, layout: Layout, dims: Sequence[int | str]) -> Iterator[OwnRows]:
    """The rows that a rank has of what crosses, as the ranks of one stage deal them out.

    How many sequences of its own it has, the inputs of its run say.
    """
    for dim in layout.row_dims:
        rows = layout.dims[dim]
        assert isinstance(rows, Rows)
        for level in rows.levels:
            if level == program.own_batch:
                continue
            if level.kind != dims[dim]:
                raise LayoutError(f"{node.name!r} cannot cross to another stage: how many {rows} come is not known")
            yield OwnRows(dim, level.last_axes, level.order)


def _weight(program: Program, name: str) -> Weight:
    if name not in program.weights:
        raise CaptureError(f"the graph uses the weight {name!r}, which the program does not describe")
    return program.weights[name]


def _run_input(program: Program, given: Input) -> RunInput:
    dims = _named_dims(program, given.value.shape, f"input {given.name!r}")
    return RunInput(given.name, given.value.dtype, dims, given.default, given.bound, given.without)


def _named_dims(program: Program, shape: Sequence[int | sympy.Expr], what: str) -> tuple[int | str, ...]:
    names = {symbol: name for name, symbol in program.symbols.items()}
    dims: list[int | str] = []
    for dim in shape:
        if isinstance(dim, (int, sympy.Integer)):
            dims.append(int(dim))
        elif dim in names:
            dims.append(names[dim])
        else:
            known = ", ".join(program.symbols)
            raise CaptureError(f"{what} has a dim of {dim}; required: a whole number or one of {known}")
    return tuple(dims)
