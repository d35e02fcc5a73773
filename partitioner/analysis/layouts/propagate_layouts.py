"""The layout of every value once the weights are placed, and where collectives go, before anything is rewritten.

Partial sums travel along chains of linear ops with a single user, to the point where another partial sum joins them
(attention and MLP in parallel, routed and shared experts) or where the tensor is smallest; there one all-reduce
completes them. Elsewhere they are completed where they arise.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from torch import fx

from partitioner.analysis.layouts.infer_layout import Inference, Layouts
from partitioner.analysis.layouts.localise import Localised
from partitioner.analysis.layouts.memoise import Inferrer
from partitioner.analysis.layouts.partial_sums import addends, is_linear_in
from partitioner.analysis.rules import notation
from partitioner.analysis.rules.data_movement import is_move
from partitioner.program.node_arguments import arguments, describe, evaluate, node_values
from partitioner.program.program import Program, Value
from partitioner.sharding.layout import REPLICATED, Layout, Rows
from runtime.ops.expert_exchange import localise_experts
from runtime.ops.experts import expert_combine
from runtime.ops.state import cache_append, state_read, state_write

__all__ = ["Placement", "Unplaceable", "batched", "place", "state_layout"]

_TYPICAL = 64
"""Stands for batch and sequence where sizes of activations are compared."""


_Chain = tuple[Layouts, dict[fx.Node, tuple[tuple[fx.Node, Layout], ...]], dict[fx.Node, Localised]]
"""Of the nodes between a weight and its user: layouts, requirements, local moves."""


class Unplaceable(Exception):
    """A node whose local version would not be the part of the whole that its layout says.

    weights: the split weights that its operands are made of.
    """

    def __init__(self, node: fx.Node, why: str, weights: tuple[str, ...]) -> None:
        super().__init__(f"{node.name}: {why}")
        self.node, self.why, self.weights = node, why, weights

    @property
    def reason(self) -> str:
        """For the report."""
        return f"{describe(self.node)}: {self.why}"


@dataclass
class Placement:
    """layouts: as users see each value. requires: per node, what each operand must be. reduced: all-reduce after
    these.
    """

    layouts: Layouts = field(default_factory=dict)
    requires: dict[fx.Node, tuple[tuple[fx.Node, Layout], ...]] = field(default_factory=dict)
    reduced: dict[fx.Node, frozenset[str]] = field(default_factory=dict)
    localised: dict[fx.Node, Localised] = field(default_factory=dict)
    weights: dict[str, Layout] = field(default_factory=dict)
    states: dict[str, Layout] = field(default_factory=dict)


def place(program: Program, weights: dict[str, Layout]) -> Placement:
    """Raises `Unplaceable` where the analysis has to keep more together.

    A state is held as what is written to it comes out, which depends on how it is read: whole at first, then as it was
    written, until both agree.
    """
    states = {name: state.layout for name, state in program.states.items()}
    nodes = list(program.graph.nodes)
    for last in (False, False, False, True):
        run = _Placing(program, Placement(weights=dict(weights), states=dict(states)))
        run.place_weights(nodes)
        for node in nodes:
            run.place(node)
        if run.written == states or last:
            break
        states = run.written
    run.push_to_weights(nodes)
    return run.done


def _without_rows(layout: Layout) -> Layout:
    return Layout(tuple(None if isinstance(dim, Rows) else dim for dim in layout.dims), layout.partial)


def batched(state: Layout, batch: Rows | None = None) -> Layout:
    """How a state per sequence is held, with the batch as its first dim. batch: the sequences that a rank has."""
    return Layout((batch, *state.dims))


def state_layout(value: Layout, *, per_token: bool) -> Layout:
    """How a state is held whose values, with batch and tokens, are laid out so."""
    dims = value.dims[1:]
    return Layout((*dims[:-2], dims[-1]) if per_token else dims)


def _sums_experts(node: fx.Node) -> bool:
    """Whether it sums what some of the experts make of every token."""
    if node.target is not expert_combine:
        return False
    gates = arguments(node)["gates"]
    return gates.target is operator.getitem and gates.args[0].target is localise_experts


class _Placing:
    def __init__(self, program: Program, done: Placement) -> None:
        self.program, self.done = program, done
        self.inferrer = Inferrer(program)
        self.carried_to: dict[fx.Node, fx.Node] = {}
        self.typical = dict.fromkeys(program.symbols.values(), _TYPICAL)
        self.of_weights: set[fx.Node] = set()
        self.written = dict(done.states)
        """How each state is laid out where it is written."""

    def place_weights(self, nodes: list[fx.Node]) -> None:
        """Weights and what moves make of them, first: their layouts tell which contractions leave partial sums."""
        for node in nodes:
            if node.op == "get_attr":
                shape = self.program.weights[str(node.target)].shape
                self.done.layouts[node] = self.done.weights.get(str(node.target), REPLICATED(len(shape)))
                self.of_weights.add(node)
            elif is_move(node) and node_values(node):
                tensors = [n for n in node.all_input_nodes if node_values(n)]
                if tensors and all(n in self.of_weights for n in tensors):
                    self.of_weights.add(node)
                    self.place(node)

    def place(self, node: fx.Node) -> None:
        layouts = self.done.layouts
        if node in layouts:
            return
        if node.op == "placeholder":
            layouts[node] = REPLICATED(len(node.meta["val"].shape))
        elif node.op == "output":
            self.done.requires[node] = tuple((n, REPLICATED(len(layouts[n].dims))) for n in node.all_input_nodes)
        elif node.op == "call_function" and node_values(node):
            found = self.inferrer.infer(node, layouts)
            if found.problem:
                found = self._with_all_rows(node)
            if found.problem:
                raise self._unplaceable(node, found.problem)
            found = self._through_state(node, found)
            for source, want in found.requires:
                self._check_gathers(source, want)
            self.done.requires[node] = found.requires
            if is_move(node):
                self._localise(node, found)
            outputs = found.outputs
            if outputs and outputs[0].partial and not self._carries(node):
                self.done.reduced[node] = outputs[0].partial
                outputs = tuple(Layout(o.dims) for o in outputs)
            layouts[node] = outputs[0] if isinstance(node.meta["val"], Value) else outputs

    def _with_all_rows(self, node: fx.Node) -> Inference:
        """What does not work row by row gets the rows of all ranks."""
        layouts = {
            n: _without_rows(each) if isinstance(each := self.done.layouts[n], Layout) else each
            for n in node.all_input_nodes
            if n in self.done.layouts
        }
        return self.inferrer.infer(node, layouts)

    def _through_state(self, node: fx.Node, found: Inference) -> Inference:
        """A state is read and written as the ranks hold it."""
        if node.target is state_read:
            layout = batched(self.done.states[str(node.kwargs["state"])])
            return Inference((layout,), found.requires)
        if node.target in (state_write, cache_append):
            name = str(node.kwargs["state"])
            (value, natural), *others = found.requires
            natural = Layout(natural.dims)
            per_token = node.target is cache_append
            self.written[name] = state_layout(natural, per_token=per_token)
            wanted = natural if per_token else batched(self.done.states[name])
            if per_token:
                self.done.states[name] = self.written[name]
            return Inference((wanted,), ((value, wanted), *others))
        return found

    def _unplaceable(self, node: fx.Node, why: str) -> Unplaceable:
        """Goes back from the node along what is split, to the weights that started it."""
        seen, stack = {node}, [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                layout = self.done.layouts.get(source)
                several = layout if isinstance(layout, tuple) else (layout,)
                if source not in seen and any(x is not None and x.split_dims for x in several):
                    seen.add(source)
                    stack.append(source)
        weights = {str(n.target) for n in seen if n.op == "get_attr"} & self.done.weights.keys()
        return Unplaceable(node, why, tuple(sorted(weights)))

    def _check_gathers(self, source: fx.Node, want: Layout) -> None:
        """A gather puts one dim together; pieces that differ in two dims would need more than that."""
        have = self.done.layouts[source]
        for dim, (old, new) in enumerate(zip(have.dims, want.dims, strict=True)):
            others = {axis for i, s in enumerate(have.dims) if s is not None and i != dim for axis in s.axes}
            if old is not None and new is None and others & set(old.axes):
                raise self._unplaceable(source, "split in two dims and needed whole")

    def _localise(self, node: fx.Node, found: Inference) -> None:
        given = dict(found.requires)
        if not any(layout.split_dims for layout in given.values()):
            return
        alike, done = self.inferrer.localise(node, given, found.outputs)
        if not alike:
            raise self._unplaceable(node, "a rank's part of it cannot be made from the rank's part of its input")
        if done is not None:
            self.done.localised[node] = done

    # -- partial sums --------------------------------------------------------------------------------------------------

    def _carries(self, node: fx.Node) -> bool:
        """Whether the partial sum that `node` yields goes on to its user instead of being completed here."""
        target = self.carried_to.get(node)
        if target is None:
            chain = self._chain(node)
            target = chain[-1]
            self.carried_to.update(dict.fromkeys(chain, target))
        return target is not node

    def _chain(self, source: fx.Node) -> list[fx.Node]:
        """The nodes from `source` to the one after which its partial sum is best completed."""
        nodes, best = [source], 0
        while (user := self._only_user(nodes[-1])) is not None and self._passes(user, nodes[-1]):
            nodes.append(user)
            joined = any(n is not nodes[-2] and self._will_be_partial(n, user) for n in addends(user))
            if joined or self._size(user) < self._size(nodes[best]):
                best = len(nodes) - 1
        return nodes[: best + 1]

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].op == "call_function" else None

    def _size(self, node: fx.Node) -> int:
        total = 1
        for size in node_values(node)[0].shape:
            total *= evaluate(size, self.typical)
        return total

    def _passes(self, user: fx.Node, operand: fx.Node) -> bool:
        """Whether a partial sum may stay one through `user`: linear in the operand, and one tensor out."""
        return isinstance(user.meta.get("val"), Value) and is_linear_in(user, operand)

    def _will_be_partial(self, node: fx.Node, user: fx.Node) -> bool:
        if self._only_user(node) is not user:
            return False
        if node in self.done.layouts:
            layout = self.done.layouts[node]
            return isinstance(layout, Layout) and bool(layout.partial)
        if node.op != "call_function" or not node_values(node):
            return False
        if _sums_experts(node):
            return True
        if not is_move(node):
            rule = notation(node)
            for operand in rule.operands:
                layout = self.done.layouts.get(operand.node) if operand.node in self.of_weights else None
                if layout is not None and any(
                    letter in rule.sums and split is not None
                    for letter, split in zip(operand.letters, layout.dims, strict=True)
                ):
                    return True
        return any(
            self._passes(node, n) and self._will_be_partial(n, node) for n in node.all_input_nodes if node_values(n)
        )

    # -- weights that follow -------------------------------------------------------------------------------------------

    def push_to_weights(self, nodes: list[fx.Node]) -> None:
        """A bias or a norm's weight that every user needs in part is held in part."""
        wanted: dict[fx.Node, set[Layout]] = {}
        for requires in self.done.requires.values():
            for source, required in requires:
                wanted.setdefault(source, set()).add(required)
        for node in reversed(nodes):
            layout = self.done.layouts.get(node)
            wants = wanted.get(node, set())
            if not isinstance(layout, Layout) or layout.split_dims or layout.partial or len(wants) != 1:
                continue
            (want,) = wants
            if not want.split_dims or want.partial:
                continue
            chain = self._from_weight(node)
            found = self._weight_layout(chain, want) if chain else None
            if found is not None:
                self.done.layouts.update(found[0])
                self.done.requires.update(found[1])
                self.done.localised.update(found[2])
                self.done.weights[str(chain[0].target)] = found[0][chain[0]]

    def _from_weight(self, node: fx.Node) -> list[fx.Node]:
        """From a weight to `node`, if nothing else flows in and nothing else is made of it on the way."""
        chain = [node]
        while chain[-1].op != "get_attr":
            tensors = [n for n in chain[-1].all_input_nodes if node_values(n)]
            if len(tensors) != 1 or len(tensors[0].users) != 1 or not isinstance(chain[-1].meta["val"], Value):
                return []
            chain.append(tensors[0])
        return chain[::-1]

    def _weight_layout(self, chain: list[fx.Node], want: Layout) -> _Chain | None:
        """Layouts along the chain such that its end is `want`: one dim of the weight split like it."""
        if len(want.split_dims) != 1:
            return None
        split = want.dims[want.split_dims[0]]
        shape = self.program.weights[str(chain[0].target)].shape
        for dim in range(len(shape)):
            try:
                found = self._along(chain, REPLICATED(len(shape)).with_dim(dim, split))
            except (RuntimeError, IndexError):
                continue  # this dim is not the one: its size does not fit
            if found is not None and found[0][chain[-1]] == want:
                return found
        return None

    def _along(self, chain: list[fx.Node], weight: Layout) -> _Chain | None:
        """What a weight that is held as `weight` makes of each node; None where a node cannot be had so."""
        layouts: Layouts = {chain[0]: weight}
        requires: dict[fx.Node, tuple[tuple[fx.Node, Layout], ...]] = {}
        localised: dict[fx.Node, Localised] = {}
        for node in chain[1:]:
            found = self.inferrer.infer(node, layouts)
            if found.problem or any(layouts[n] != layout for n, layout in found.requires):
                return None
            layouts[node], requires[node] = found.outputs[0], found.requires
            if is_move(node):
                alike, done = self.inferrer.localise(node, dict(found.requires), found.outputs)
                if not alike:
                    return None
                if done is not None:
                    localised[node] = done
        return layouts, requires, localised
