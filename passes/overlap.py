"""The overlap pass: tokens travel to and from experts while the rank computes what does not wait for them.

    expert_send            expert_send(ahead)       tokens leave
    its experts            shared experts, half     meanwhile
    expert_return     ->   landed; its experts
    shared experts         expert_return(ahead)     sums leave
    sum                    shared experts, half     meanwhile
                           landed; sum

Tokens that are gathered and sums that are scattered overlap in the same way: collect_rows(ahead) of the tokens, and
scatter_rows(ahead). Choices and gates, which are small, are gathered before them.

`ahead` starts a collective and `landed` waits for it, as with torch's functional collectives. Collectives keep their
order in the graph, which is the same on all ranks and is proven. The ops that are moved neither depend on an exchange
nor communicate. Where nothing stands beside the experts, nothing changes. Exchanges hidden behind other work:
arXiv:2412.19437, section 3.2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from partitioner.program.node_arguments import arguments, node_values
from partitioner.program.program import Program
from runtime.ops.collectives import landed
from runtime.ops.communicating import COMMUNICATING, as_axes
from runtime.ops.expert_exchange import expert_return
from runtime.ops.experts import expert_dispatch
from runtime.ops.rows import collect_rows, scatter_rows

__all__ = ["Overlap"]

_STEPS = 16
"""How many ops after an exchange what it yields is looked for beside something else."""


@dataclass(frozen=True)
class Overlap:
    """See the module's docstring. Runs on a program whose collectives are placed.

    gathers: whether gathers and scatters overlap too; those of single tokens are too small to gain by it.
    """

    name: ClassVar[str] = "overlap"
    gathers: bool = True

    def run(self, program: Program) -> Program:
        layers, moved, row = 0, 0, ""
        for node in list(program.graph.nodes):
            send = self._sent_by(program.graph, node)
            beside = _beside(program.graph, send, node) if send is not None else []
            if send is not None and beside:
                _reorder(program.graph, send, node, beside)
                layers, moved, row = layers + 1, moved + len(beside), _in_flight(send)
        if layers:
            program.notes.append(
                f"exchanges of {layers} layers are under way while {moved} ops of what stands beside their experts "
                f"run; in flight are {row}"
            )
        program.graph.lint()
        return program

    def _sent_by(self, graph: fx.Graph, back: fx.Node) -> fx.Node | None:
        """The way there, if `back` is the way back of tokens from their experts."""
        if back.target is expert_return:
            way: Any = back.args[1]
            sent: fx.Node = way.args[0]
            return sent
        return _collected(graph, back) if back.target is scatter_rows and self.gathers else None


def _collected(graph: fx.Graph, scatter: fx.Node) -> fx.Node | None:
    """Where the tokens were collected whose experts' sums are scattered; what else they collect stands before it."""
    collected: set[fx.Node] = set()
    inside: set[fx.Node] = set()
    stack = [scatter]
    while stack:
        for each in stack.pop().all_input_nodes:
            if each.target is collect_rows:
                collected.add(each)
            elif each not in inside:
                inside.add(each)
                stack.append(each)
    dispatches = [node for node in inside if node.target is expert_dispatch]
    if len(dispatches) != 1:
        return None
    tokens: fx.Node = arguments(dispatches[0])["hidden"]
    if tokens.target is not collect_rows or as_axes(tokens.args[2]) != as_axes(scatter.args[1]):  # type: ignore[arg-type]
        return None
    place = {node: i for i, node in enumerate(graph.nodes)}
    last = max(collected, key=place.__getitem__)
    read = [place[user] for user in tokens.users]
    # what is collected ahead stands where the next such tokens will: experts copy it when they sort it
    if place[last] > min(read) or {user.target for user in tokens.users} != {expert_dispatch}:
        return None
    if last is not tokens:
        last.append(tokens)
    return tokens


def _in_flight(send: fx.Node) -> str:
    if send.target is collect_rows:
        value = send.args[0].meta["val"]  # type: ignore[union-attr]
        size = math.prod(value.shape[1:]) * value.dtype.itemsize
        return f"{size} bytes there and {size} back for each token and rank"
    hidden, index, gates = (send.args[i].meta["val"] for i in range(3))  # type: ignore[union-attr]
    back = hidden.shape[1] * hidden.dtype.itemsize
    there = back + index.shape[1] * (4 + gates.dtype.itemsize)
    return f"{there} bytes there and {back} back for each token and rank that it is sent to"


def _beside(graph: fx.Graph, send: fx.Node, back: fx.Node) -> list[fx.Node]:
    """What is added to the experts' result, as far as it can be computed while tokens are on their way, in order."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    before, after = _ancestors(send) | {send}, _descendants(send)
    for join in sorted(_descendants(back), key=place.__getitem__)[:_STEPS]:
        found: set[fx.Node] = set()
        for source in join.all_input_nodes:
            if source not in after:
                found |= {source, *_ancestors(source)} - before
        found = {node for node in found if node.op in ("call_function", "get_attr")}
        found -= {node for node in found if node.target in COMMUNICATING}
        # whatever needs one that stays, stays; so does what is read before tokens have landed
        while left := {node for node in found if _stays(node, found, before, place, place[back])}:
            found -= left
        if any(_work(node) for node in found):
            return sorted(found, key=place.__getitem__)
    return []


def _stays(node: fx.Node, found: set[fx.Node], before: set[fx.Node], place: dict[fx.Node, int], end: int) -> bool:
    if any(source not in found and source not in before and source.op != "placeholder" for source in _operands(node)):
        return True
    return any(user not in found and place[user] < end for user in node.users)


def _operands(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.op != "get_attr"]


def _work(node: fx.Node) -> int:
    """What a product reads of weights, by which the two ways share out what is computed meanwhile."""
    weights = [source for source in node.all_input_nodes if source.op == "get_attr"]
    shapes = [value.shape for source in weights for value in node_values(source) if len(value.shape) > 1]
    return sum(math.prod(int(size) for size in shape) for shape in shapes)


def _reorder(graph: fx.Graph, send: fx.Node, back: fx.Node, beside: list[fx.Node]) -> None:
    total, done, first = sum(map(_work, beside)), 0, 0
    for first, node in enumerate(beside, 1):  # noqa: B007 - how many run on the way there
        done += _work(node)
        if 2 * done >= total:
            break
    if send.target is collect_rows:
        _run_during(graph, send, [send], send, beside[:first])
        _run_during(graph, back, [back], back, beside[first:])
        return
    taken = sorted(send.users, key=lambda user: int(user.args[1]))  # type: ignore[arg-type]
    for getitem in reversed(taken):
        send.append(getitem)
    _run_during(graph, send, taken[:3], taken[-1], beside[:first])
    _run_during(graph, back, [back], back, beside[first:])


def _run_during(graph: fx.Graph, node: fx.Node, given: list[fx.Node], last: fx.Node, meanwhile: list[fx.Node]) -> None:
    """`node` begins, `meanwhile` runs behind `last`, and what it has `given` is read once it has landed."""
    node.kwargs = {**node.kwargs, "ahead": True}
    for each in meanwhile:
        last.append(each)
        last = each
    for each in given:
        users = list(each.users)
        with graph.inserting_after(last):
            last = graph.call_function(landed, (each,))
        last.meta = {key: value for key, value in each.meta.items() if key != "why"}
        for user in users:
            user.replace_input_with(each, last)
    node.meta["why"] = f"under way while {len(meanwhile)} ops run that do not wait for it"


def _ancestors(node: fx.Node) -> set[fx.Node]:
    return _reached(node, lambda each: each.all_input_nodes)


def _descendants(node: fx.Node) -> set[fx.Node]:
    return _reached(node, lambda each: each.users)


def _reached(node: fx.Node, following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(following(node))
    while stack:
        each = stack.pop()
        if each not in found:
            found.add(each)
            stack += following(each)
    return found
