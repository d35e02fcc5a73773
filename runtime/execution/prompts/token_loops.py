"""Loops over tokens in a graph for one token at a time: what must wait for the token before, and what need not.

    h = state_read("h") -> a = mul(h, decay) -> b = add(a, x) -> state_write(b, "h")     b of one token needs b of the
                                                                                        token before: a loop
    p = state_read("p") -> add(p, x) ..      state_write(x, "p")                         p is x of the token before

Where what is written of a token is taken to be read by the next one, the graph has cycles; its strongly connected
components are what must run token by token, and nothing else must. They are found by two walks (Kosaraju; Sharir,
Computers & Mathematics with Applications 7(1), 1981).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from runtime.ops.state import state_read, state_write

__all__ = ["TokenLoop", "loops_of", "states_of"]


@dataclass(frozen=True)
class TokenLoop:
    """reads, writes: of its states, in one order. body: all else that runs for each token, in the graph's order."""

    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]
    body: tuple[fx.Node, ...]

    @property
    def nodes(self) -> set[fx.Node]:
        return {*self.reads, *self.writes, *self.body}

    @property
    def given(self) -> tuple[fx.Node, ...]:
        """What its body takes from outside, in the graph's order."""
        inside = self.nodes
        last = [write.args[0] for write in self.writes]
        sources = [n for node in self.body for n in node.all_input_nodes] + [n for n in last if isinstance(n, fx.Node)]
        return tuple(dict.fromkeys(n for n in sources if n not in inside))

    @property
    def handed_on(self) -> tuple[fx.Node, ...]:
        """What others take of it."""
        inside = self.nodes
        found = (*self.reads, *self.body)
        return tuple(node for node in found if any(user not in inside for user in node.users))


def states_of(graph: fx.Graph) -> dict[str, tuple[fx.Node, fx.Node]] | str:
    """Where each state is read and written, once each; or why that cannot be said."""
    reads, writes = dict[str, fx.Node](), dict[str, fx.Node]()
    for node in graph.nodes:
        for target, found in ((state_read, reads), (state_write, writes)):
            if node.op == "call_function" and node.target is target:
                name = str(node.kwargs["state"])
                if name in found:
                    return f"the state {name!r} is {'read' if found is reads else 'written'} more than once"
                found[name] = node
    for name in reads:
        if name not in writes:
            return f"the state {name!r} is read and never written"
    # one that is only written is told by its last token
    return {name: (reads[name], write) for name, write in writes.items() if name in reads}


def loops_of(graph: fx.Graph) -> list[TokenLoop] | str:
    """The loops, in the order in which they begin; or why they cannot be told."""
    states = states_of(graph)
    if isinstance(states, str):
        return states
    following: dict[fx.Node, list[fx.Node]] = {node: list(node.users) for node in graph.nodes}
    for read, write in states.values():
        following[write].append(read)
    place = {node: i for i, node in enumerate(graph.nodes)}
    found = []
    for component in _components(following):
        if len(component) > 1:
            nodes = sorted(component, key=place.__getitem__)
            pairs = [pair for pair in states.values() if pair[0] in component]
            reads, writes = tuple(read for read, _ in pairs), tuple(write for _, write in pairs)
            body = tuple(node for node in nodes if node not in reads and node not in writes)
            found.append(TokenLoop(reads, writes, body))
    return sorted(found, key=lambda loop: min(place[node] for node in loop.nodes))


def _components(following: Mapping[fx.Node, Iterable[fx.Node]]) -> list[set[fx.Node]]:
    """The strongly connected components of a graph, by Kosaraju's two walks over it."""
    done, order = set[fx.Node](), list[fx.Node]()
    for start in following:
        if start in done:
            continue
        done.add(start)
        walk = [(start, iter(following[start]))]
        while walk:
            node, rest = walk[-1]
            ahead = next((each for each in rest if each not in done), None)
            if ahead is None:
                order.append(node)
                walk.pop()
            else:
                done.add(ahead)
                walk.append((ahead, iter(following[ahead])))
    before: dict[fx.Node, list[fx.Node]] = {node: [] for node in following}
    for node, users in following.items():
        for user in users:
            before[user].append(node)
    found, taken = list[set[fx.Node]](), set[fx.Node]()
    for node in reversed(order):
        if node in taken:
            continue
        component, waiting = set[fx.Node](), [node]
        taken.add(node)
        while waiting:
            each = waiting.pop()
            component.add(each)
            for source in before[each]:
                if source not in taken:
                    taken.add(source)
                    waiting.append(source)
        found.append(component)
    return found
