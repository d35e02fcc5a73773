"""Stages: which nodes and weights of a program belong to which pipeline stage, and what crosses between them.

    node.meta["stages"]   the stages that compute a node: one, or several where computing it again is cheaper than
                          sending it (what is made of inputs alone)
    StageTable            weight -> stages, decided once for all entries: names of weights are what their graphs share
    crossings(program)    per boundary, the values that go from a stage to the next

The vocabulary head may be shared out over all stages: then its nodes are marked with the number after the last stage's,
and what they need crosses one boundary more, to all ranks at once.

A value crosses every boundary between the stage that makes it and the last one that uses it. The whole graph stays one
program, which layouts, reports and proofs read; `compile.emit` cuts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from partitioner.errors import LayoutError

__all__ = ["StageTable", "computed_on", "crossings", "stages_of", "table_of"]


@dataclass(frozen=True)
class StageTable:
    """of_weight: the stages that hold a weight, several where it is tied or shared. count: of stages.

    costs: what each stage was expected to take, in units of one; crossing_bytes: over each boundary, at the sizes that
    the costs were counted for; places: how many there were to choose from; balance: for what it was chosen; rows_apart:
    whether rows of a batch may be run one after the other; pairs_per_token: see `runtime.program.rank_program.Stage`.
    speeds: how fast the ranks of each stage are, relative to each other. shares_head: whether the rows of the
    vocabulary head are shared out over all stages; costs_alone: what each stage would take if they were not; why_alone:
    why they are not, where that was asked.
    """

    of_weight: Mapping[str, frozenset[int]]
    count: int
    costs: tuple[float, ...] = ()
    crossing_bytes: tuple[int, ...] = ()
    places: int = 0
    balance: str = ""
    rows_apart: bool = False
    pairs_per_token: int = 0
    speeds: tuple[float, ...] = ()
    shares_head: bool = False
    costs_alone: tuple[float, ...] = ()
    why_alone: str = ""

    @property
    def parts(self) -> int:
        """Into how many the nodes are divided: the stages, and a head that all of them share out."""
        return self.count + self.shares_head


def stages_of(node: fx.Node) -> frozenset[int]:
    """The stages that compute `node`: as marked; of a weight or an input, those that use it."""
    if node.op in ("get_attr", "placeholder"):
        return frozenset[int]().union(*(stages_of(user) for user in node.users))
    found: frozenset[int] = node.meta["stages"]
    return found


def computed_on(node: fx.Node, count: int) -> frozenset[int]:
    """The same for a program of `count` stages, where what they share out is computed on all."""
    found = stages_of(node)
    return frozenset(range(count)) if count in found else found


def table_of(graph: fx.Graph, count: int) -> StageTable:
    """The table that a marked graph says."""
    return StageTable(
        {str(node.target): computed_on(node, count) for node in graph.nodes if node.op == "get_attr" and node.users},
        count,
    )


def crossings(graph: fx.Graph, count: int) -> tuple[tuple[fx.Node, ...], ...]:
    """For each k below count - 1, what goes from stage k to stage k + 1, in graph order.

    Raises `LayoutError`, naming both nodes, where a stage would need what only a later one computes.
    """
    found: list[list[fx.Node]] = [[] for _ in range(count - 1)]
    if count == 1:
        return ()
    for node in graph.nodes:
        if node.op in ("get_attr", "placeholder", "output"):
            continue
        made = stages_of(node)
        if not made or not made <= set(range(count)):
            raise LayoutError(f"node {node.name!r} belongs to the stages {sorted(made)}; there are 0 to {count - 1}")
        for stage in _read_on(node, count) - made:
            # from the latest stage that has it
            start = max(each for each in made if each < stage)
            for boundary in range(start, stage):
                if node not in found[boundary]:
                    found[boundary].append(node)
    return tuple(map(tuple, found))


def _read_on(node: fx.Node, count: int) -> frozenset[int]:
    """The stages that read what `node` yields. Raises `LayoutError` where one of them is before all that compute it."""
    found: frozenset[int] = frozenset()
    for user in node.users:
        stages = frozenset({count - 1}) if user.op == "output" else stages_of(user)
        if stages and min(stages) < (first := min(stages_of(node))):
            raise LayoutError(
                f"node {user.name!r} of stage {min(stages)} needs {node.name!r}, which is computed on stage {first} "
                "only: values go from a stage to later ones"
            )
        found |= stages
    return found
