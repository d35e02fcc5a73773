"""That ranks which share out experts speak of the same ones: where tokens go, who holds which weights, what counts.

    limit_experts                    as many experts as are dealt out; gates are limited as the choices are
    localise_experts, expert_send    every expert on at least one rank; of the mesh's axes, as many ranks as they have
    expert_dispatch                  as many experts as the rank has
    grouped_linear                   the experts of the weights are those of the choices, rank by rank
    expert_combine                   the gates that went with the choices by which the rows were sorted
    expert_return                    the way back of those that were sent
    landed                           stands before whoever reads what was sent ahead

Layouts say that rows are routed over an axis; which experts a rank has is in the nodes' options and in the table.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from partitioner.analysis.layouts.infer_experts import OWN
from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.errors import LayoutError
from partitioner.program.node_arguments import arguments
from partitioner.program.program import Entry, Program
from partitioner.proof.per_rank_integers import Checks, expect
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Rows, Split
from runtime.ops.collectives import landed
from runtime.ops.communicating import as_axes
from runtime.ops.expert_exchange import expert_return, expert_send, localise_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear, limit_experts

__all__ = ["EXPERT_CHECKS", "require_landed"]

_ROUTES = (localise_experts, expert_send)


def _axes_of(route: fx.Node) -> tuple[str, ...]:
    a = arguments(route)
    return tuple(a["axes"]) if route.target is localise_experts else as_axes(a["axis"])


def _owners_of(route: fx.Node) -> Split:
    """Which experts each rank has, as the node says."""
    a, start, owned = arguments(route), 0, []
    for count in a["counts"]:
        owned.append(IndexSet.of(a["experts"][start : start + count]))
        start += count
    return Split(_axes_of(route), tuple(owned))


def _check_route(program: Program, node: fx.Node, layouts: Layouts) -> None:
    a, axes = arguments(node), _axes_of(node)
    experts, counts, ranks = list(a["experts"]), list(a["counts"]), program.mesh.size(*axes)
    if len(counts) != ranks or sum(counts) != len(experts):
        raise LayoutError(f"node {node.name!r} deals {len(experts)} experts as {counts} to the {ranks} ranks of {axes}")
    if missing := set(range(max(experts) + 1)) - set(experts):
        raise LayoutError(f"node {node.name!r}: no rank has expert {min(missing)}")
    limits = [_made_by(a[name], limit_experts, place) for place, name in enumerate(("index", "gates"))]
    if limits[0] is not limits[1]:
        raise LayoutError(f"node {node.name!r} takes choices of {_name(limits[0])} and gates of {_name(limits[1])}")
    if limits[0] is not None and (total := arguments(limits[0])["num_experts"]) != max(experts) + 1:
        raise LayoutError(f"node {limits[0].name!r} limits {total} experts, of which there are {max(experts) + 1}")
    start = 0
    for count in counts:
        mine = experts[start : start + count]
        if mine != sorted(set(mine)):
            raise LayoutError(f"node {node.name!r}: the experts of a rank must be named once, ascending; got {mine}")
        start += count
    if node.target is expert_send and a["ahead"]:
        require_landed(node, [user for user in node.users if user.args[1] != 3])
    if node.target is localise_experts:
        expect(program, node, "rank", a["rank"], Entry(0, axes, tuple(range(ranks))))


def _check_dispatch(program: Program, node: fx.Node, layouts: Layouts) -> None:
    a = arguments(node)
    route = _route(a["index"], 0 if _is_local(a["index"]) else 1)
    if route is None:
        return
    counts = tuple(arguments(route)["counts"])
    whole = max(arguments(route)["experts"]) + 1
    expect(program, node, "num_experts", a["num_experts"], Entry(whole, _axes_of(route), counts))
    if route.target is expert_send and _route(a["hidden"], 0) is not route:
        raise LayoutError(f"node {node.name!r} sorts {a['hidden'].name!r} by the choices of others: {route.name!r}")


def _check_linear(program: Program, node: fx.Node, layouts: Layouts) -> None:
    a = arguments(node)
    rows = layouts[a["rows"]].dims[0]
    if not isinstance(rows, Rows) or rows.kind in OWN:  # every rank has all experts, or none of them is shared
        return
    dispatch = _made_by(a["counts"], expert_dispatch, 2)
    index = None if dispatch is None else arguments(dispatch)["index"]
    route = None if index is None else _route(index, 0 if _is_local(index) else 1)
    if route is None:
        raise LayoutError(f"node {node.name!r}: the counts of its rows, {a['counts'].name!r}, are of no dispatch")
    owners = _owners_of(route)
    for name in ("weight", "bias"):
        if isinstance(a.get(name), fx.Node) and layouts[a[name]].dims[0] != owners:
            raise LayoutError(
                f"node {node.name!r}: tokens are sent as if the experts were {owners}, and its {name} holds them as "
                f"{layouts[a[name]].dims[0]}"
            )


def _check_combine(program: Program, node: fx.Node, layouts: Layouts) -> None:
    a = arguments(node)
    dispatch = _made_by(a["order"], expert_dispatch, 1)
    index = None if dispatch is None else arguments(dispatch)["index"]
    route = None if index is None else _route(index, 0 if _is_local(index) else 1)
    gates = a["gates"]
    mine = _route(gates, 1 if _is_local(gates) else 2)
    if route is not mine:
        raise LayoutError(
            f"node {node.name!r} weighs what the experts of {_name(route)} made with the gates of {_name(mine)}"
        )


def _check_return(program: Program, node: fx.Node, layouts: Layouts) -> None:
    a = arguments(node)
    if a["ahead"]:
        require_landed(node, [node])
    send = _made_by(a["back"], expert_send, 3)
    combine = a["rows"]
    while combine.target is not expert_combine:
        sources = [n for n in combine.all_input_nodes if n.op == "call_function"]
        if len(sources) != 1:
            break
        combine = sources[0]
    went = _route(arguments(combine)["gates"], 2) if combine.target is expert_combine else None
    if send is None or send is not went or _axes_of(send) != as_axes(a["axis"]):
        raise LayoutError(f"node {node.name!r} returns what came by {_name(went)} by the way of {_name(send)}")


def _is_local(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target is localise_experts


def _route(node: fx.Node, place: int) -> fx.Node | None:
    """The node that made these choices, rows or gates, if it is one that deals them to ranks."""
    for op in _ROUTES:
        if (found := _made_by(node, op, place)) is not None:
            return found
    return None


def require_landed(node: fx.Node, given: list[fx.Node]) -> None:
    """What is on its way is read by who waits for it."""
    for each in given:
        if early := [user for user in each.users if user.target is not landed]:
            raise LayoutError(
                f"node {early[0].name!r} reads {each.name!r}, which {node.name!r} has sent ahead: it must have landed"
            )


def _made_by(node: fx.Node, op: Any, place: int) -> fx.Node | None:
    while node.target is landed:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not operator.getitem or node.args[1] != place:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) and source.target is op else None


def _name(node: fx.Node | None) -> str:
    return "no exchange" if node is None else repr(node.name)


EXPERT_CHECKS: Checks = {
    localise_experts: _check_route,
    expert_send: _check_route,
    expert_dispatch: _check_dispatch,
    grouped_linear: _check_linear,
    expert_combine: _check_combine,
    expert_return: _check_return,
}
