"""What each node of a program costs one rank: products, bytes read and written, and what it sends to other ranks.

    view, getitem, integer     nothing
    data-movement op           bytes, where it copies
    communicating op           its meetings (`runtime.ops.communicating`)
    op in the rule table       products by its notation, and bytes
    op without a rule          bytes of all that it is given and makes; `unsure` says so

What could not be said exactly stands in `unsure` of its node, and in the report of the program's cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from partitioner.analysis.cost.local_sizes import RankSizes, bytes_of
from partitioner.analysis.cost.memory_traffic import MemoryTraffic
from partitioner.analysis.cost.products import LATENT, SHARED_OUT, kept_operands, product_flops
from partitioner.analysis.rules import notation
from partitioner.program.node_arguments import arguments, describe, node_values
from partitioner.program.program import Program, Value
from partitioner.program.stages import computed_on, stages_of
from partitioner.sharding.layout import REPLICATED
from runtime.ops.communicating import COMMUNICATING, Kind, Meeting, read_call

__all__ = ["MeetingCost", "NodeCost", "node_costs"]


@dataclass(frozen=True)
class MeetingCost:
    """One primitive over `ranks`, in order of coordinate. bytes: what this rank brings; most: the largest of them."""

    kind: Kind
    ranks: tuple[int, ...]
    bytes: int
    most: int


@dataclass(frozen=True)
class NodeCost:
    """See the module's docstring. flops: of matrix products, in `dtype`; `stages`: those that compute the node."""

    name: str
    op: str
    path: str
    stages: frozenset[int]
    dtype: str
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    meetings: tuple[MeetingCost, ...] = ()
    unsure: str = ""


def node_costs(program: Program, coordinates: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[NodeCost, ...]:
    """Of every op, in graph order, on the rank at `coordinates`; of all stages, where there are several.

    sizes: {"batch": 1, "sequence": 1, "past": 1023}; see `RankSizes`.
    """
    at = RankSizes(program, coordinates, sizes)
    traffic = MemoryTraffic(at)
    found = []
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            traffic.source(node)
        elif node.op == "call_function" and node_values(node):
            found.append(_cost(node, at, traffic))
    return tuple(found)


def _cost(node: fx.Node, at: RankSizes, traffic: MemoryTraffic) -> NodeCost:
    flops = 0
    unsure: list[str] = []
    meetings: tuple[MeetingCost, ...] = ()
    dtype = node_values(node)[0].dtype
    if node.target in COMMUNICATING:
        moved = traffic.communicate(node)
        meetings = tuple(_meeting(node, meeting, at, unsure) for meeting in COMMUNICATING[node.target].meetings(node))
        if node.target in SHARED_OUT:
            flops = product_flops(node, notation(node), at)
    elif traffic.moves(node):
        moved = traffic.move(node)
    else:
        rule = notation(node)
        moved = traffic.compute(node, rule)
        if rule.opaque:
            unsure.append(f"no rule for {describe(node)}: bytes only")
        else:
            flops = product_flops(node, rule, at)
            dtype = node_values(rule.operands[0].node)[0].dtype if flops else dtype
    if moved.unsure:
        unsure.append(moved.unsure)
    if symbols := at.unknown(node):
        unsure.append(f"the size {symbols} depends on data: counted as 1")
    return NodeCost(
        node.name,
        describe(node).partition(" in ")[0],
        str(node.meta.get("path") or ""),
        _stages(node, at.program),
        str(dtype).removeprefix("torch."),
        flops,
        moved.read,
        moved.written,
        meetings,
        "; ".join(unsure),
    )


def _stages(node: fx.Node, program: Program) -> frozenset[int]:
    if "stages" not in node.meta:
        return frozenset({0})
    return stages_of(node) if program.stages is None else computed_on(node, program.stages.count)


def _meeting(node: fx.Node, meeting: Meeting, at: RankSizes, unsure: list[str]) -> MeetingCost:
    """The operand of the meeting's shape says how the ranks hold what they bring."""
    ranks = at.program.mesh.group(meeting.axes, at.rank)
    if meeting.shape is None:
        unsure.append(f"what {describe(node)} sends is not known: counted as 0 bytes")
        return MeetingCost(meeting.kind, ranks, 0, 0)
    value = Value(meeting.shape, meeting.dtype)
    for operand in read_call(node).operands:
        if isinstance(operand, fx.Node) and operand.meta.get("val") == value:
            layout = at.layouts(operand)[0]
            brought = {rank: bytes_of(at.shape(value, layout, rank), value) for rank in ranks}
            return MeetingCost(meeting.kind, ranks, brought[at.rank], max(brought.values()))
    if node.target in SHARED_OUT:  # keys and values together, or heads of all: a share as large as that of an operand
        a = arguments(node)
        of_queries = len(meeting.shape) == 1 or (node.target in LATENT and a["how"] == "merge")
        operand = a["q"] if of_queries else kept_operands(node)[0]
        given, layout = operand.meta["val"], at.layouts(operand)[0]
        whole = bytes_of(at.shape(value, REPLICATED(len(value.shape))), value)
        all_of_it = bytes_of(at.shape(given, REPLICATED(len(given.shape))), given)
        brought = {rank: whole * bytes_of(at.shape(given, layout, rank), given) // all_of_it for rank in ranks}
        return MeetingCost(meeting.kind, ranks, brought[at.rank], max(brought.values()))
    unsure.append(f"how ranks hold what {describe(node)} sends is not known: counted whole")
    whole = bytes_of(at.shape(value, REPLICATED(len(value.shape))), value)
    return MeetingCost(meeting.kind, ranks, whole, whole)
