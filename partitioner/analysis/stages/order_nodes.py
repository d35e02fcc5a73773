"""The nodes of a program as a pipeline sees them: three classes, and an order of what is left.

    made of inputs     positions, masks, rotary factors: computed again on every stage that needs them
    made of weights    reshaped or joined weights: with their users
    ordered            the rest; each has a level, the number of the last reader of weights before it

A reader is a node that reads a checkpoint's weights. A cut after reader i puts the nodes of levels 0 to i in front of
it; what needs no weights follows what it is made of, or goes to its users, whichever sends fewer bytes (`settle`).
Positions in the graph would not do: passes put reshaped weights at its head, and what is computed from them would seem
to cross everywhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from partitioner.program.node_arguments import arguments, node_values, operation, shape_at
from partitioner.program.program import Program, Value, Weight
from partitioner.sharding.layout import Layout, Rows

__all__ = [
    "NodeClasses",
    "by_state",
    "can_cross",
    "canonical",
    "classify",
    "is_tensor",
    "levels_of",
    "settle",
    "sizes_from_inputs",
    "state_of",
]


@dataclass(frozen=True)
class NodeClasses:
    """See the module's docstring. ordered: in graph order; weights_of: the weights that each reader reads."""

    inputs: frozenset[fx.Node]
    weights: frozenset[fx.Node]
    ordered: tuple[fx.Node, ...]
    weights_of: dict[fx.Node, frozenset[str]]

    def before(self, node: fx.Node) -> list[fx.Node]:
        """The ordered nodes that it is made of."""
        return [source for source in node.all_input_nodes if self._is_ordered(source)]

    def _is_ordered(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node not in self.inputs and node not in self.weights


def canonical(weight: Weight) -> str:
    """The checkpoint's weight that this one is, or is made of: the name that all entries know it by."""
    return weight.name if weight.of is None else canonical(weight.of)


def state_of(node: fx.Node) -> str | None:
    """What the node remembers between runs."""
    state = node.kwargs.get("state")
    return None if state is None else str(state)


def classify(program: Program) -> NodeClasses:
    """Sorts every node of the graph."""
    remembered: set[str] = set()
    while True:
        found = _classify(program, remembered)
        # what has once been written from ordered values is read as one
        written = {state for node in found.ordered if (state := state_of(node)) is not None and state not in remembered}
        if not written:
            return found
        remembered |= written


def _classify(program: Program, remembered: set[str]) -> NodeClasses:
    inputs, weights, constants = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    ordered: list[fx.Node] = []
    read: dict[fx.Node, frozenset[str]] = {}
    weights_of: dict[fx.Node, frozenset[str]] = {}
    for node in program.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "placeholder":
            inputs.add(node)
        elif node.op == "get_attr":
            weight = program.weights[str(node.target)]
            if weight.source in ("checkpoint", "made"):
                weights.add(node)
                read[node] = frozenset({canonical(weight)})
            else:
                inputs.add(node)
                constants.add(node)
        elif node.op != "call_function":
            continue
        elif state_of(node) not in remembered and all(source in inputs for source in sources):
            inputs.add(node)
            if all(source in constants for source in sources) and state_of(node) is None:
                constants.add(node)
        elif state_of(node) is None and all(source in weights or source in constants for source in sources):
            weights.add(node)
            read[node] = frozenset().union(*(read[source] for source in sources if source in weights))
        else:
            ordered.append(node)
            if found := frozenset[str]().union(*(read[source] for source in sources if source in weights)):
                weights_of[node] = found
    return NodeClasses(frozenset(inputs), frozenset(weights), tuple(ordered), weights_of)


def levels_of(classes: NodeClasses) -> dict[fx.Node, int]:
    """The level of each ordered node; of a reader, its own number."""
    levels: dict[fx.Node, int] = {}
    readers = 0
    for node in classes.ordered:
        if node in classes.weights_of:
            levels[node] = readers
            readers += 1
        else:
            levels[node] = max((levels[source] for source in classes.before(node)), default=0)
    return levels


def settle(program: Program, classes: NodeClasses, places: dict[fx.Node, int], last: int) -> dict[fx.Node, int]:
    """`places` (levels, or stages) with nodes moved back towards their users where fewer bytes cross that way.

    A norm's first half moves behind the cut, since the residual that it reads crosses anyway; attention stays in front
    of it, for its result is smaller than what it reads. What cannot cross, such as a flattened batch, moves where what
    it is made of can and is no larger. What reads weights or states stays, whatever its size.
    """
    found = dict(places)
    for node in reversed(classes.ordered):
        wanted = min((last if user.op == "output" else found.get(user, last) for user in node.users), default=0)
        if node in classes.weights_of or state_of(node) is not None or not is_tensor(node) or wanted <= found[node]:
            continue
        before = classes.before(node)
        # what does not cross already would have to, in place of the node
        new = [s for s in before if not any(found.get(u, 0) >= wanted for u in s.users if u is not node)]
        if not all(can_cross(program, source) for source in new):
            continue
        instead, size = sum(_bytes(program, source) for source in new), _bytes(program, node)
        if instead < size or (instead == size and not can_cross(program, node)):
            found[node] = wanted
    return found


def _bytes(program: Program, node: fx.Node) -> int:
    (value,) = node_values(node)
    return math.prod(shape_at(value, dict.fromkeys(program.symbols.values(), 1))) * value.dtype.itemsize


def sizes_from_inputs(program: Program) -> None:
    """Sizes of ordered tensors are read off inputs that have the same: integers do not cross from stage to stage."""
    given: dict[sympy.Expr, tuple[fx.Node, int]] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Value):
            for dim, size in enumerate(value.shape):
                if size in program.symbols.values():
                    given.setdefault(size, (node, dim))
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    made: dict[sympy.Expr, fx.Node] = {}
    for node in list(program.graph.nodes):
        if (
            node.op != "call_function"
            or operation(node) is not torch.ops.aten.sym_size
            or node.meta["val"] not in given
        ):
            continue
        size = node.meta["val"]
        if made.get(size) is node or not _is_given(program, node):
            continue
        if size not in made:
            source, dim = given[size]
            with program.graph.inserting_after(placeholders[-1]):
                made[size] = program.graph.call_function(torch.ops.aten.sym_size.int, (source, dim))
            made[size].meta = {"val": size}
        node.replace_all_uses_with(made[size])
        program.graph.erase_node(node)


def _is_given(program: Program, size: fx.Node) -> bool:
    """Whether it is one of all rows, or of the sequences of a rank, as those of inputs are."""
    a = arguments(size)
    layout = a["self"].meta.get("layout")
    return not isinstance(layout, Layout) or layout.dims[a["dim"]] in (None, program.own_batch)


def by_state(classes: NodeClasses) -> dict[str, list[fx.Node]]:
    """The ordered nodes that read or write each state."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for node in classes.ordered:
        state = state_of(node)
        if state is not None:
            found[state].append(node)
    return dict(found)


def can_cross(program: Program, node: fx.Node) -> bool:
    """A tensor that every rank of a stage has all of, or its own tokens of, in sizes that inputs tell."""
    layout = node.meta.get("layout")
    shape = node.meta["val"].shape if is_tensor(node) else ()
    if not is_tensor(node) or (isinstance(layout, Layout) and not _is_told(program, layout, shape)):
        return False
    known = set(program.symbols.values())
    return all(isinstance(size, int) or size in known or size.is_Integer for size in shape)


def _is_told(program: Program, layout: Layout, shape: Sequence[int | sympy.Expr]) -> bool:
    """Whether the rank of another stage that has the same coordinates otherwise has the same part of it, and knows it.

    Rows of a symbol, which inputs have all of; not those that were sent to a rank, nor parts of other dims.
    """
    if layout.partial or layout.split_dims:
        return False
    rows = [(dim, layout.dims[dim]) for dim in layout.row_dims]
    return all(
        isinstance(each, Rows) and all(program.symbols.get(level.kind) == shape[dim] for level in each.levels)
        for dim, each in rows
    )


def is_tensor(node: fx.Node) -> bool:
    return bool(node_values(node)) and isinstance(node.meta.get("val"), Value)
