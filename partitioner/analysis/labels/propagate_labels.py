"""Which weight indices must stay together: labels pushed through the graph, op by op.

Activations start free (the same on every rank). A contraction of a free input with a weight starts labels, one per
output index of the weight (column-parallel). A contraction of a labelled input with a weight ends them
(row-parallel): the *site* records, for each contracted index, the set of weight indices it depends on. In between,
moves run as themselves on the label tensors and every other op follows its index notation. Symbolic dims have size 1.

Column then row is Megatron-LM's scheme (arXiv:1909.08053, section 3); finding it from labels needs no table of modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from partitioner.analysis.labels.index_sets import Ids, compact, expanded
from partitioner.analysis.labels.label_memory import LabelMemory
from partitioner.analysis.labels.label_state import Collapse, Labels, Site, WeightSlice, WeightState
from partitioner.analysis.rules.data_movement import is_move, run_move
from partitioner.analysis.rules.notation import Letters, Notation, Operand
from partitioner.errors import PlanError
from partitioner.program.node_arguments import describe, evaluate, map_nodes, node_values, shape_at
from partitioner.program.program import Program, Value

__all__ = ["LabelRun"]

_LARGEST_COPY = 1 << 24
"""Index tensors of weights are expanded views; a move that would copy more elements than this makes the weight
opaque.
"""


class LabelRun:
    """One pass of the labels over a program's graph for `ranks` ranks.

    pinned: weights that stay whole. partial: names of linear reductions that are carried out as partial sums.
    together: names of nodes whose innermost labelled dim (1), or all of whose dims (2), must stay on one rank.
    memory: of earlier runs, which may differ in `pinned` and in `partial` only.
    """

    def __init__(
        self,
        program: Program,
        ranks: int,
        *,
        pinned: Set[str],
        partial: Set[str],
        together: Mapping[str, int],
        memory: LabelMemory,
    ) -> None:
        self.program, self.ranks, self.pinned, self.partial, self.together = program, ranks, pinned, partial, together
        self.ones: dict[sympy.Symbol, int] = dict.fromkeys(program.symbols.values(), 1)
        self.states: dict[fx.Node, Any] = {}
        self.memory, self.labels = memory, memory.labels()
        self.sequence = program.symbols.get("sequence")

    def run(self, nodes: list[fx.Node]) -> Labels:
        for node in nodes:
            if node.op != "placeholder":
                operands = tuple(self.states.get(n) for n in node.all_input_nodes)
                self.states[node], found = self.memory.step(node, operands, self.pinned, self.partial, self._alone)
                self.labels.add(found)
        return self.labels

    def _alone(self, node: fx.Node) -> tuple[Any, Labels]:
        """The state of a node, and what is found at it."""
        before, self.labels = self.labels, self.memory.labels()
        try:
            self.states[node] = None
            if node.op == "get_attr":
                name = str(node.target)
                self.states[node] = self.memory.whole_weight(name, self.program.weights[name].shape)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self._output(source)
            elif node.op == "call_function" and node_values(node):
                self.states[node] = self._move(node) if is_move(node) else self._compute(node)
                if node.name in self.together:
                    self._keep_together(node)
            return self.states[node], self.labels
        finally:
            self.labels = before

    def _keep_together(self, node: fx.Node) -> None:
        state = self.states[node]
        if isinstance(state, Ids):
            dims = state.varying[-1:] if self.together[node.name] == 1 else state.varying
            merged = self.labels.lattice.union(state, dims)
            if merged is not None and merged.distinct < self.ranks:
                names = self.labels.weights_of(i for t in merged.terms for i in torch.unique(compact(t)).tolist())
                why = f"{describe(node)}: a rank's part of it cannot be made from the rank's part of its input"
                self.labels.collapses.append(Collapse(node, False, why, names))
            self.states[node] = merged and merged.each(lambda term: term.expand(state.shape))

    # -- moves ---------------------------------------------------------------------------------------------------------

    def _move(self, node: fx.Node) -> Any:
        sources = [n for n in node.all_input_nodes if node_values(n)]
        states = [self.states.get(n) for n in sources]
        none = None if isinstance(node.meta["val"], Value) else (None,) * len(node_values(node))
        if all(state is None for state in states):
            return none
        if len(sources) == 1 and isinstance(states[0], WeightState):
            return self._move_weight(node, states[0], none)
        if all(state is None or isinstance(state, WeightState) for state in states):
            return none

        try:
            rounds = max(len(ids.terms) for state in states for ids in _ids_in(state))
            found = [self._move_terms(node, i) for i in range(rounds)]
        except (RuntimeError, IndexError, ValueError):  # sizes that depend on data: nothing is known of the result
            return self._mixed(node)
        shapes = [shape_at(value, self.ones) for value in node_values(node)]
        if any(term.shape != shape for terms in found for term, shape in zip(terms, shapes, strict=True)):
            return self._mixed(node)  # likewise
        joined = tuple(
            self.labels.lattice.join(*(Ids((term,)) for term in terms)) for terms in zip(*found, strict=True)
        )
        return joined[0] if isinstance(node.meta["val"], Value) else joined

    def _move_terms(self, node: fx.Node, i: int) -> list[Tensor]:
        """The move on the i-th term of each operand."""

        def free(value: Value) -> Tensor:
            return torch.zeros([1] * len(value.shape), dtype=torch.int64).expand(shape_at(value, self.ones))

        def term(state: Any, value: Value) -> Tensor:
            return state.terms[i] if isinstance(state, Ids) and i < len(state.terms) else free(value)

        def argument(source: fx.Node) -> Any:
            state, value = self.states.get(source), source.meta.get("val")
            if isinstance(value, Value):
                return term(state, value)
            if isinstance(value, (tuple, list)):
                return tuple(map(term, state if state is not None else (None,) * len(value), value))
            return evaluate(value, self.ones)

        found = run_move(node, map_nodes(node.args, argument), map_nodes(node.kwargs, argument))
        return list(map(expanded, found if isinstance(found, (list, tuple)) else [found]))

    def _mixed(self, node: fx.Node) -> Any:
        """Every element of what `node` yields depends on every element of its operands."""
        everything = self.labels.lattice.join(
            *(
                self.labels.lattice.union(ids.each(lambda term: term.reshape(-1)), [0])
                for source in node.all_input_nodes
                for ids in _ids_in(self.states.get(source))
            )
        )
        shapes = [shape_at(value, self.ones) for value in node_values(node)]
        if everything is not None and any(size < 0 for shape in shapes for size in shape):
            limits = self.program.limits.items()
            sizes = ", ".join(f"{name} {low}" + ("" if high is None else f" to {high}") for name, (low, high) in limits)
            raise PlanError(
                f"cannot split {self.program.name}: its trace holds for {sizes} only, and shorter ones are what splits "
                f"are found at ({describe(node)}); "
                "partition(..., fixed_length=N) compiles it for prompts of exactly N tokens"
            )
        found = tuple(
            everything and everything.each(lambda t, shape=shape: t.view([1] * len(shape)).expand(shape))  # type: ignore[misc]
            for shape in shapes
        )
        return found[0] if isinstance(node.meta["val"], Value) else found

    def _move_weight(self, node: fx.Node, state: WeightState, none: Any) -> Any:
        def run(indices: Tensor) -> Any:
            args = map_nodes(
                (node.args, node.kwargs),
                lambda n: indices if node_values(n) else evaluate(n.meta["val"], self.ones),
            )
            return run_move(node, args[0], args[1])

        large = self.program.weights[state.name].numel > _LARGEST_COPY
        found = []
        for indices in state.indices:
            moved = run(indices)
            if large and any(t.untyped_storage().nbytes() > 8 * _LARGEST_COPY for t in _tensors(moved)):
                return none
            found.append(moved)
        if found and isinstance(found[0], (tuple, list)):
            return tuple(WeightState(state.name, piece) for piece in zip(*found, strict=True))
        return WeightState(state.name, tuple(found))

    # -- computation ---------------------------------------------------------------------------------------------------

    def _compute(self, node: fx.Node) -> Any:
        if all(self.states.get(n) is None for n in node.all_input_nodes):
            return None if isinstance(node.meta["val"], Value) else (None,) * len(node_values(node))
        rule = self.memory.rule(node)
        values = node_values(node)
        labelled = [o for o in rule.operands if isinstance(self.states.get(o.node), Ids)]
        weights = [o for o in rule.operands if isinstance(self.states.get(o.node), WeightState)]
        single = isinstance(node.meta["val"], Value)
        if not labelled:
            found = self._start(node, rule, weights)
            return found if single else (found,) * len(values)
        if node.name in self.partial and rule.in_parts and self._reduced_in_parts(node, rule, labelled):
            kept = rule.in_parts & {letter for names in rule.outputs for letter in names}
            if not kept:
                return None if single else (None,) * len(values)
            rule = replace(rule, whole=rule.whole - kept)
        for letter in sorted(rule.sums):
            if self._end(node, letter, labelled, weights):
                return None if single else (None,) * len(values)
        try:
            merged = [
                self._merged(rule, labelled, outputs, value)
                for outputs, value in zip(rule.outputs, values, strict=True)
            ]
        except RuntimeError:  # sizes that depend on data do not agree at these values of the symbols
            return self._mixed(node)
        self._note_collapse(node, rule, labelled, merged[0])
        return merged[0] if single else tuple(merged)

    def _along(self, operand: Operand, letter: str) -> WeightSlice | None:
        """The weight indices along one letter of an operand that is a weight; None where they do not line up with a
        dim.
        """
        state = self.states[operand.node]
        if state.name in self.pinned or letter not in operand.letters:
            return None
        at = operand.letters.index(letter)
        for dim, indices in enumerate(state.indices):
            vector = (
                indices[tuple(slice(None) if i == at else 0 for i in range(indices.ndim))] if indices.numel() else None
            )
            if vector is None or (vector.numel() > 1 and int(vector[0]) == int(vector[-1])):
                continue
            view = [-1 if i == at else 1 for i in range(indices.ndim)]
            if _varies_only(indices, at) or torch.equal(indices, vector.view(view).expand_as(indices)):
                return WeightSlice(state.name, dim, vector)
        return None

    def _start(self, node: fx.Node, rule: Notation, weights: list[Operand]) -> Ids | None:
        """Labels that begin at this node; None where none do."""
        if len(weights) == len(rule.operands) or not rule.sums:
            return None
        free = [o for o in rule.operands if o not in weights]
        for operand in weights:
            for letter in sorted(rule.sums & set(operand.letters)):
                shared = any(letter in o.letters for o in free)
                if not shared:
                    self._start_table(node, operand, letter)
                    return None
                for start in operand.letters:
                    if start is None or start not in rule.outputs[0] or any(start in o.letters for o in free):
                        continue
                    slice_ = self._along(operand, start)
                    if slice_ is None:
                        continue
                    if slice_.indices.numel() < self.ranks:
                        few = f"{slice_.indices.numel()} indices are too few for {self.ranks} ranks"
                        self.labels.unsplit.setdefault(slice_.name, few)
                        continue
                    shape = shape_at(node_values(node)[0], self.ones)
                    at = rule.outputs[0].index(start)
                    view = [-1 if i == at else 1 for i in range(len(shape))]
                    return Ids((self._fresh(node, slice_).view(view).expand(shape),))
        return None

    def _start_table(self, node: fx.Node, table: Operand, letter: str) -> None:
        """A look-up contracts the table's rows with nothing else: labels start and end in one place."""
        slice_ = self._along(table, letter)
        if slice_ is None:
            return
        if self._worth_splitting(node, table):
            self.labels.sites.append(Site(node, "contract", letter, self._fresh(node, slice_), slice_))
        else:
            self.labels.unsplit.setdefault(slice_.name, "too few rows, or partial sums larger than an activation")

    def _worth_splitting(self, node: fx.Node, table: Operand) -> bool:
        """A look-up table is split where its partial sums are no larger than an activation (not a bias per pair of
        tokens).
        """
        rows = node_values(table.node)[0].shape[0]
        size = sympy.Mul(*node_values(node)[0].shape)
        return evaluate(rows, self.ones) >= self.ranks and (
            self.sequence is None or sympy.degree(sympy.expand(size), self.sequence) <= 1
        )

    def _fresh(self, node: fx.Node, slice_: WeightSlice) -> Tensor:
        base = self.labels.base(slice_.name, slice_.dim, self.program.weights[slice_.name].shape[slice_.dim])
        self.labels.starts.setdefault(slice_.name, node)
        return self.labels.lattice.singletons(slice_.indices + base)

    def _ids(self, operand: Operand) -> Ids:
        """Ids of an operand with its letters' own indices (heads that read a shared kv head see that head's ids)."""
        ids: Ids = self.states[operand.node]
        for letter, via in operand.via:
            dim, heads = operand.letters.index(letter), torch.tensor(via, dtype=torch.int64)
            ids = ids.each(lambda term, dim=dim, heads=heads: term.index_select(dim, heads))  # type: ignore[misc]
        return ids

    def _end(self, node: fx.Node, letter: str, labelled: list[Operand], weights: list[Operand]) -> bool:
        """Whether labels end here because `letter` is summed over ranks; records the site."""
        along = [o for o in labelled if letter in o.letters]
        with_letter = [o for o in weights if letter in o.letters]
        if len(along) != 1 or len(with_letter) > 1:
            return False
        operand = along[0]
        ids = self._ids(operand)
        at = operand.letters.index(letter)
        if with_letter:
            slice_ = self._along(with_letter[0], letter)
            if slice_ is None:
                return False
            merged = self.labels.lattice.union(ids, [at])
            if merged is not None and merged.distinct >= max(self.ranks, 2):
                return False  # heads stay apart: the weight is shared by all of them and stays whole
        elif node.name in self.partial:
            slice_ = None
        else:
            return False
        vector = self.labels.lattice.vector(ids, at)
        if vector is None:
            return False
        kind = "contract" if slice_ else "reduce"
        self.labels.sites.append(Site(node, kind, letter, vector, slice_))
        return True

    def _reduced_in_parts(self, node: fx.Node, rule: Notation, labelled: list[Operand]) -> bool:
        """Whether a whole-row reduction, once written out, leaves one partial sum; records the site."""
        (letter,) = rule.in_parts
        vectors = [
            self.labels.lattice.vector(self._ids(o), o.letters.index(letter)) for o in labelled if letter in o.letters
        ]
        if len(vectors) != 1 or vectors[0] is None:
            return False
        self.labels.sites.append(Site(node, "reduce", letter, vectors[0], None))
        return True

    def _merged(self, rule: Notation, labelled: list[Operand], names: Letters, value: Value) -> Ids | None:
        shape = shape_at(value, self.ones)
        found = []
        for operand in labelled:
            gone = [
                i for i, name in enumerate(operand.letters) if name is None or name not in names or name in rule.whole
            ]
            ids = self.labels.lattice.union(self._ids(operand), gone)
            found.append(ids and ids.each(lambda term, operand=operand: _placed(term, operand, names).expand(shape)))  # type: ignore[misc]
        return self.labels.lattice.join(*found)

    def _note_collapse(self, node: fx.Node, rule: Notation, labelled: list[Operand], merged: Ids | None) -> None:
        if merged is None or merged.distinct >= self.ranks:
            return
        if max(self.states[o.node].distinct for o in labelled) >= self.ranks:
            linear = bool(rule.in_parts) or (bool(rule.sums) and not rule.whole and len(rule.operands) == 1)
            ids = {i for term in merged.terms for i in torch.unique(compact(term)).tolist()}
            labels = self.labels.joined(ids)
            why = self._why_whole(node, rule)
            self.labels.collapses.append(Collapse(node, linear, why, self.labels.weights_of(ids), labels))

    def _why_whole(self, node: fx.Node, rule: Notation) -> str:
        weights = [self.states[o.node].name for o in rule.operands if isinstance(self.states.get(o.node), WeightState)]
        if rule.opaque:
            return f"has no rule ({describe(node)})"
        if rule.sums and self.pinned & set(weights):
            return f"feeds {describe(node)}, whose weight is whole"
        return f"{describe(node)} needs the whole row"

    def _output(self, source: fx.Node) -> None:
        ids = self.states.get(source)
        if isinstance(ids, Ids):
            at = ids.varying[0] if len(ids.varying) == 1 else 0
            vector = self.labels.lattice.vector(ids, at)
            if vector is None:
                everything = self.labels.lattice.union(ids, list(range(len(ids.shape))))
                vector = torch.zeros(1, dtype=torch.int64) if everything is None else everything.terms[0].reshape(-1)
            self.labels.sites.append(Site(source, "gather", str(at), vector))


def _ids_in(state: Any) -> list[Ids]:
    return [ids for ids in (state if isinstance(state, tuple) else (state,)) if isinstance(ids, Ids)]


def _placed(ids: Tensor, operand: Operand, names: Letters) -> Tensor:
    """The operand's dims in the order of `names`, size 1 where it does not have the letter or has it no more."""
    order = [operand.letters.index(name) for name in names if name is not None and name in operand.letters]
    rest = [i for i in range(ids.ndim) if i not in order]
    ids = ids.permute([*order, *rest])[(..., *(0 for _ in rest))]  # type: ignore[index]
    missing = [i for i, name in enumerate(names) if name is None or name not in operand.letters]
    for i in missing:
        ids = ids.unsqueeze(i)
    return ids


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _varies_only(ids: Tensor, at: int) -> bool:
    shape = compact(ids).shape
    return all(size == 1 for i, size in enumerate(shape) if i != at)
