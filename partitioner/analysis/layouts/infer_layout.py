"""The layout of what an op yields, from the layouts of its operands; and the layout it requires of each.

Ops in index notation combine splits letter by letter: a dim that two operands split differently is held where both
are. A summed letter that is split leaves a partial sum. Moves run as themselves on marks (present, absent, don't
care), per coordinate, and what comes out must be a product of index sets again.

One function serves three ends: it infers layouts while a pass rewrites, checks them afterwards (a requirement that is
not met is an error), and says where a collective is needed, which is what a plan costs.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from partitioner.analysis.labels.assign_owners import index_set
from partitioner.analysis.labels.index_sets import compact
from partitioner.analysis.rules import notation
from partitioner.analysis.rules.data_movement import run_move
from partitioner.analysis.rules.notation import Notation, Operand
from partitioner.program.node_arguments import arguments, evaluate, map_nodes, node_values, operation, shape_at
from partitioner.program.program import Program, Value
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Split

aten = torch.ops.aten

__all__ = ["Inference", "Layouts", "disjoint", "infer_compute", "infer_move"]

Layouts = dict[fx.Node, Any]
"""Layout of each node, or a tuple of them for several outputs."""


@dataclass(frozen=True)
class Inference:
    """outputs: one layout per output. requires: (operand, layout) for each tensor operand. problem: why it cannot be.

    A required partial sum of an operand that is the same on every rank means: it must count once in the sum over ranks.
    """

    outputs: tuple[Layout, ...]
    requires: tuple[tuple[fx.Node, Layout], ...]
    problem: str | None = None


def disjoint(split: Split) -> Split:
    """Every index on the first of the ranks that hold it."""
    taken: set[int] = set()
    owned = []
    for indices in split.owned:
        mine = [i for i in indices.indices() if i not in taken]
        taken.update(mine)
        owned.append(IndexSet.of(mine))
    return Split(split.axes, tuple(owned))


def _layout(layouts: Layouts, node: fx.Node) -> Layout:
    found = layouts[node]
    assert isinstance(found, Layout), node
    return found


# -- ops in index notation ---------------------------------------------------------------------------------------------


def infer_compute(node: fx.Node, layouts: Layouts) -> Inference:
    """For a call_function node that is not a move."""
    rule = notation(node)
    if all(_layout(layouts, o.node).is_replicated for o in rule.operands):
        return Inference(
            tuple(REPLICATED(len(v.shape)) for v in node_values(node)),
            tuple((o.node, layouts[o.node]) for o in rule.operands),
        )
    splits = {letter: _combined(letter, rule, layouts) for letter in _letters(rule)}
    for letter in rule.whole | (rule.sums if rule.averages else frozenset()):
        splits[letter] = None
    _one_per_axis(rule, layouts, splits)
    partial = _carried(rule, layouts)
    if any(partial & set(split.axes) for split in splits.values() if split is not None):
        partial = frozenset()
    for letter in rule.sums:
        split = splits[letter]
        if split is not None:
            splits[letter] = disjoint(split)
            partial |= set(split.axes)
    sums = _sum_operands(rule, layouts, splits) if partial else set()
    requires = tuple(
        (
            o.node,
            Layout(tuple(_dim_split(o, letter, splits) for letter in o.letters), partial if i in sums else frozenset()),
        )
        for i, o in enumerate(rule.operands)
    )
    outputs = tuple(
        Layout(
            tuple(splits.get(letter) if letter is not None and letter not in rule.whole else None for letter in names),
            partial,
        )
        for names in rule.outputs
    )
    return Inference(outputs, requires)


def _one_per_axis(rule: Notation, layouts: Layouts, splits: dict[str, Split | None]) -> None:
    """Leaves at most one letter split over each axis, unless one operand holds just that product of index sets.

    Rank r would compute rows r of columns r only: the blocks beside the diagonal would be computed by nobody.
    """
    axes = {split.axes for split in splits.values() if split is not None}
    for axis in axes:
        split_letters = {letter for letter, split in splits.items() if split is not None and split.axes == axis}
        if len(split_letters) < 2:
            continue
        together = any(
            all(
                splits[n] == own
                for n, own in zip(o.letters, _layout(layouts, o.node).dims, strict=True)
                if n in split_letters
            )
            and split_letters <= set(o.letters)
            and not o.via
            for o in rule.operands
        )
        if together and not split_letters & rule.sums:
            continue
        kept = next((n for names in rule.outputs for n in names if n in split_letters), min(split_letters))
        for letter in split_letters - {kept}:
            splits[letter] = None


def _letters(rule: Notation) -> set[str]:
    return {letter for operand in rule.operands for letter in operand.letters if letter is not None}


def _sum_operands(rule: Notation, layouts: Layouts, splits: dict[str, Split | None]) -> set[int]:
    """In each term of a sum that is left partial, the operand that must be (or is) a partial sum itself.

    None where the term is contracted over a split letter. Where no operand of a term is partial yet, its first one is
    asked to be: a term that is the same on every rank would be summed once per rank.
    """
    found = set()
    for term in rule.terms:
        names = {letter for i in term for letter in rule.operands[i].letters if letter is not None}
        if any(splits[letter] is not None for letter in names & rule.sums):
            continue
        inside = [i for i in sorted(term) if _layout(layouts, rule.operands[i].node).partial]
        found.add(inside[0] if inside else min(term - rule.denominators))
    return found


def _combined(letter: str, rule: Notation, layouts: Layouts) -> Split | None:
    """What every operand with the letter can agree on; None where something would be held by no rank."""
    found: Split | None = None
    for operand in rule.operands:
        if letter not in operand.letters:
            continue
        split = _layout(layouts, operand.node).dims[operand.letters.index(letter)]
        if split is None:
            continue
        via = dict(operand.via).get(letter)
        if via is not None:
            members = [set(indices.indices()) for indices in split.owned]
            split = Split(split.axes, tuple(IndexSet.of(i for i, j in enumerate(via) if j in m) for m in members))
        if found is None:
            found = split
        elif found != split:
            if found.axes != split.axes:
                return None
            both = tuple(a & b for a, b in zip(found.owned, split.owned, strict=True))
            if _union(both) != _union(found.owned) & _union(split.owned):
                return None
            found = Split(found.axes, both)
    return found


def _union(sets: tuple[IndexSet, ...]) -> IndexSet:
    return IndexSet.of(i for indices in sets for i in indices.indices())


def _dim_split(operand: Operand, letter: str | None, splits: dict[str, Split | None]) -> Split | None:
    split = splits.get(letter) if letter is not None else None
    if split is None:
        return None
    via = dict(operand.via).get(letter or "")
    if via is None:
        return split
    owned = tuple(IndexSet.of(via[i] for i in indices.indices()) for indices in split.owned)
    size = operand.node.meta["val"].shape[operand.letters.index(letter)]
    return None if all(indices.size == size for indices in owned) else Split(split.axes, owned)


def _carried(rule: Notation, layouts: Layouts) -> frozenset[str]:
    """Axes over which the result stays a partial sum because its operands are, as far as the op is linear in them."""
    partial = {i: _layout(layouts, o.node).partial for i, o in enumerate(rule.operands)}
    axes = frozenset[str]().union(*partial.values())
    linear_in = frozenset[int]().union(*rule.terms) - rule.denominators if rule.terms else frozenset[int]()
    if any(p and (p != axes or i not in linear_in) for i, p in partial.items()):
        return frozenset()
    return axes if all(sum(bool(partial[i]) for i in term) <= 1 for term in rule.terms) else frozenset()


# -- moves -------------------------------------------------------------------------------------------------------------

_FREE, _PRESENT, _ABSENT = 0, 1, 2


def infer_move(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    """For a move."""
    sources = [n for n in node.all_input_nodes if node_values(n)]
    values = node_values(node)
    if node.target is operator.getitem and isinstance(layouts[sources[0]], tuple):
        picked = layouts[sources[0]][node.args[1]]
        return Inference((picked,), ())
    given = {n: _layout(layouts, n) for n in sources}
    partial = {n: layout.partial for n, layout in given.items()}
    axes = frozenset().union(*partial.values())
    if axes and any(p != axes for p in partial.values()):
        axes = frozenset()  # a partial sum beside a free value: completed first
    requires = tuple((n, Layout(layout.dims, axes)) for n, layout in given.items())
    if all(not layout.split_dims for layout in given.values()):
        return Inference(tuple(Layout((None,) * len(v.shape), axes) for v in values), requires)
    split_axes = {s.axes for layout in given.values() for s in layout.dims if s is not None}
    if len(split_axes) > 1:
        return Inference((), requires, f"operands are split over different axes {sorted(split_axes)}")
    (split_axis,) = split_axes
    ones = dict.fromkeys(program.symbols.values(), 1)
    per_rank = []
    for index in range(program.mesh.size(*split_axis)):
        marks = {n: _marks(given[n], n.meta["val"], index, ones) for n in sources}

        def argument(n: fx.Node, marks: dict[fx.Node, Tensor] = marks) -> Any:
            return marks[n] if n in marks else evaluate(n.meta["val"], ones)

        args, kwargs = program.whole((node.args, dict(node.kwargs)))
        try:
            found = run_move(node, map_nodes(args, argument), map_nodes(kwargs, argument))
        except (RuntimeError, IndexError, ValueError) as error:
            return Inference((), requires, f"sizes that depend on data: {error}")
        outputs = list(found) if isinstance(found, (list, tuple)) else [found]
        sets = [_product(output) for output in outputs]
        if any(s is None for s in sets):
            return Inference((), requires, "what a rank would hold is not a product of index sets")
        per_rank.append(sets)
    layouts_out = []
    for i, value in enumerate(values):
        dims: list[Split | None] = []
        for dim, size in enumerate(shape_at(value, ones)):
            owned = tuple(rank[i][dim] for rank in per_rank)  # type: ignore[index]
            dims.append(None if all(o.size == size for o in owned) else Split(split_axis, owned))
        layouts_out.append(Layout(tuple(dims), axes))
    if len(sources) > 1:
        requires = tuple((n, _beside(node, n, layout, layouts_out[0])) for n, layout in requires)
    return Inference(tuple(layouts_out), requires)


def _beside(node: fx.Node, source: fx.Node, layout: Layout, output: Layout) -> Layout:
    """What one of several operands must be: split as the result is, except along the dim where they are put
    together.
    """
    op, a = operation(node), arguments(node)
    if "dim" not in a:  # expand_as and its like: the second operand gives the shape
        return Layout(output.dims, layout.partial) if source is a.get("other") else layout
    dim = a["dim"] % len(output.dims)
    dims = list(output.dims)
    if op is aten.stack or (op is aten.select_scatter and source is a["src"]):
        del dims[dim]
    elif dim < len(layout.dims):
        dims[dim] = layout.dims[dim]
    return Layout(tuple(dims), layout.partial)


def _marks(layout: Layout, value: Value, index: int, ones: Any) -> Tensor:
    """Present or absent for each element at the index-th coordinate; all free for a replicated operand."""
    shape = shape_at(value, ones)
    marks = torch.full([1] * len(shape), _PRESENT if layout.split_dims else _FREE, dtype=torch.int8)
    for dim in layout.split_dims:
        split = layout.dims[dim]
        assert split is not None
        vector = torch.full((shape[dim],), _ABSENT, dtype=torch.int8)
        for a, b in split.owned[index].intervals:
            vector[a:b] = _PRESENT
        marks = torch.maximum(marks, vector.view([-1 if d == dim else 1 for d in range(len(shape))]))
    return marks.expand(shape)


def _product(marks: Tensor) -> list[IndexSet] | None:
    """Per dim the indices to hold: those with a present element, or with nothing but free ones. None: not a product."""
    if not marks.numel():
        return [IndexSet.range(0, size) for size in marks.shape]
    small = compact(marks)
    keep = []
    for dim in range(marks.ndim):
        if small.shape[dim] == 1 and marks.shape[dim] != 1:
            keep.append(IndexSet.range(0, marks.shape[dim]))
            continue
        others = [d for d in range(marks.ndim) if d != dim]
        present = (small == _PRESENT).amax(others) if others else small == _PRESENT
        taken = (small != _FREE).amax(others) if others else small != _FREE
        keep.append(index_set(present | ~taken))
    held = small
    for dim, indices in enumerate(keep):
        if indices.size != held.shape[dim] and small.shape[dim] == marks.shape[dim]:
            held = held.index_select(dim, torch.tensor(indices.indices(), dtype=torch.int64))
    absent_everywhere = not bool((small == _PRESENT).any())
    if absent_everywhere and bool((small == _ABSENT).any()):
        return _nothing(small, marks)
    return None if bool((held == _ABSENT).any()) else keep


def _nothing(small: Tensor, marks: Tensor) -> list[IndexSet]:
    """A rank that holds nothing: empty along the innermost dim that tells absent from free, whole along the others.

    `symbols are 1`: a dim of size 1 is taken only where no larger one was split, and never an expanded one.
    """
    own = [d for d in range(marks.ndim) if small.shape[d] == marks.shape[d]]
    empty = max((d for d in own if marks.shape[d] > 1), default=own[-1])
    return [IndexSet.range(0, 0 if d == empty else size) for d, size in enumerate(marks.shape)]
