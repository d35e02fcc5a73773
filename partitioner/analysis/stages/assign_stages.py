"""Which stage computes a node, given which stages hold which weights.

    ordered            the first stage that has what it is made of and its weights; of several that hold its weights,
                       the last that is early enough for its users
    made of inputs     all stages that need it
    made of weights    the stages of its users

Names of weights are all that the graphs of one model share, so that each is marked by the same table.
"""

from __future__ import annotations

from torch import fx

from partitioner.analysis.stages.order_nodes import NodeClasses, by_state, classify, settle, state_of
from partitioner.errors import PlanError
from partitioner.program.node_arguments import describe
from partitioner.program.program import Program
from partitioner.program.stages import StageTable, crossings

__all__ = ["assign_stages"]


def assign_stages(program: Program, table: StageTable) -> None:
    """Marks every node of the program, node.meta["stages"].

    Raises `PlanError` where a stage would have nothing to hand on, or needs what only a later one has.
    """
    classes = classify(program)
    stages = _ordered(program, classes, table)
    for node, stage in stages.items():
        node.meta["stages"] = frozenset({stage})
    states = {state: set[int]() for node in classes.inputs if (state := state_of(node)) is not None}
    for node in reversed(program.graph.nodes):
        if node.op != "call_function" or node in stages:
            continue
        wanted = set[int]()
        for user in node.users:
            wanted |= {table.parts - 1} if user.op == "output" else user.meta["stages"]
        state = state_of(node)
        if state is not None:  # every stage that reads it writes it too
            wanted |= states[state]
            states[state] |= wanted
        node.meta["stages"] = frozenset(wanted or {0})
    for stage, crossing in enumerate(crossings(program.graph, table.parts)):
        if not crossing:
            raise PlanError(
                f"{program.name}: stage {stage} of {table.count} would compute nothing that another needs, as the next "
                f"one has all its weights too; give fewer stages than pp={table.count}, or other stage_starts"
            )


def _ordered(program: Program, classes: NodeClasses, table: StageTable) -> dict[fx.Node, int]:
    latest = _latest(classes, table)
    states = by_state(classes)
    at = dict.fromkeys(states, 0)
    while True:
        stages: dict[fx.Node, int] = {}
        for node in classes.ordered:
            state = state_of(node)
            first = max((stages[source] for source in classes.before(node)), default=0)
            first = max(first, at.get(state, 0) if state is not None else 0)
            stages[node] = _stage(program, classes, table, node, first, latest[node])
        found = {state: max(stages[node] for node in nodes) for state, nodes in states.items()}
        if found == at:
            return settle(program, classes, stages, table.parts - 1)
        at = found


def _latest(classes: NodeClasses, table: StageTable) -> dict[fx.Node, int]:
    """The last stage that is early enough for all who use a node."""
    latest: dict[fx.Node, int] = {}
    for node in reversed(classes.ordered):
        found = min((latest[user] for user in node.users if user in latest), default=table.parts - 1)
        for name in classes.weights_of.get(node, ()):
            found = min(found, max(table.of_weight.get(name, {table.parts - 1})))
        latest[node] = found
    return latest


def _stage(program: Program, classes: NodeClasses, table: StageTable, node: fx.Node, first: int, latest: int) -> int:
    holders = [table.of_weight[name] for name in classes.weights_of.get(node, ()) if name in table.of_weight]
    if not holders:
        return first
    common = frozenset(range(table.parts)).intersection(*holders)
    early = [stage for stage in common if first <= stage <= latest]
    if early:
        return max(early)
    late = [stage for stage in common if stage >= first]
    if late:
        return min(late)
    names = ", ".join(sorted(classes.weights_of[node]))
    raise PlanError(
        f"{program.name}: {describe(node)} reads {names}, held by stage {sorted(common)}, but what it is computed from "
        f"is known on stage {first} only: this graph has another order than that of whole texts; give stage_starts "
        "that keep these together"
    )
