"""The layout of what an op in index notation yields, from the layouts of its operands; and what it requires of each.

Splits combine letter by letter: a dim that two operands split differently is held where both are, over the axes of
both. A summed letter that is split leaves a partial sum. A letter along which a rank has its own rows must be the same
rows in every operand. Data-movement ops are in `infer_move`.

One function serves three ends: it infers layouts while a pass rewrites, checks them afterwards (a requirement that is
not met is an error), and says where a collective is needed, which is what a plan costs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from partitioner.analysis.rules import notation
from partitioner.analysis.rules.notation import Notation, Operand
from partitioner.errors import PlanError
from partitioner.program.node_arguments import node_values, operation, symbols_of
from partitioner.program.program import Program
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import REPLICATED, Layout, Rows, Split, in_order, points
from partitioner.sharding.mesh import Mesh

aten = torch.ops.aten

__all__ = ["FILLED", "Inference", "Layouts", "disjoint", "infer_compute", "layout_of", "sizes_read"]

Dim = Split | Rows | None
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
    taken = IndexSet(())
    owned = []
    for indices in split.owned:
        owned.append(indices - taken)
        taken |= indices
    return Split(split.axes, tuple(owned))


def layout_of(layouts: Layouts, node: fx.Node) -> Layout:
    found = layouts[node]
    assert isinstance(found, Layout), node
    return found


def infer_compute(program: Program, node: fx.Node, layouts: Layouts) -> Inference:
    """For a call_function node that is not a move."""
    rule = notation(node)
    if operation(node) in FILLED:
        return Inference((_filled(program, node, layouts),), ())
    if all(layout_of(layouts, o.node).is_replicated for o in rule.operands):
        return Inference(
            tuple(REPLICATED(len(v.shape)) for v in node_values(node)),
            tuple((o.node, layouts[o.node]) for o in rule.operands),
        )
    for letter in sorted(_letters(rule)):
        if len(rows := _rows(letter, rule, layouts)) > 1:
            return Inference((), (), f"rows meet other ranks' rows: {' and '.join(sorted(map(str, rows)))}")
    splits = {letter: _combined(letter, rule, layouts, program.mesh) for letter in _letters(rule)}
    for letter in rule.whole | (rule.sums if rule.averages else frozenset()):
        splits[letter] = None
    _one_per_axis(rule, layouts, splits)
    partial = _carried(rule, layouts)
    if any(partial & set(split.axes) for split in splits.values() if split is not None):
        partial = frozenset()
    for letter in rule.sums:
        split = splits[letter]
        if split is not None:
            splits[letter] = disjoint(split) if isinstance(split, Split) else split
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


FILLED = {aten.full, aten.new_full, aten.zeros, aten.new_zeros, aten.ones, aten.new_ones, aten.empty, aten.new_empty}
"""Ops that put one number everywhere: as many rows as they are told."""


def _filled(program: Program, node: fx.Node, layouts: Layouts) -> Layout:
    """A dim has a rank's own rows where its size is read off what has them."""
    read = [dim for read, i in sizes_read(node) if isinstance(dim := layouts[read].dims[i], Rows)]
    own = {rows for dim in read for rows in dim.by_dim}
    dims: list[Dim] = []
    for size in node_values(node)[0].shape:
        found = [rows for rows in own if program.symbols.get(rows.kind) in symbols_of(size)]
        dims.append(found[0] if len(found) == 1 else found[0].merged(found[1]) if len(found) == 2 else None)
    return Layout(tuple(dims))


def sizes_read(node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """The tensors and dims whose sizes the integers among a node's arguments are made of."""
    seen: set[fx.Node] = set()
    stack = [n for n in node.all_input_nodes if not node_values(n)]
    while stack:
        integer = stack.pop()
        if integer in seen:
            continue
        seen.add(integer)
        if operation(integer) is aten.sym_size:
            read, dim = integer.args
            assert isinstance(read, fx.Node)
            assert isinstance(dim, int)
            yield read, dim
        else:
            stack += [n for n in integer.all_input_nodes if not node_values(n)]


def _one_per_axis(rule: Notation, layouts: Layouts, splits: dict[str, Dim]) -> None:
    """Leaves at most one letter divided over each axis, unless one operand holds just that product of index sets.

    Rank r would compute rows r of columns r only: the blocks beside the diagonal would be computed by nobody. Splits
    come before rows, which are made whole more cheaply than weights.
    """
    for axis in in_order(axis for split in splits.values() if split is not None for axis in split.axes):
        divided = {letter for letter, split in splits.items() if split is not None and axis in split.axes}
        if len(divided) < 2 or _held_together(divided, rule, layouts, splits):
            continue
        constant = {letter for letter in divided if isinstance(splits[letter], Split)} or divided
        kept = next((n for names in rule.outputs for n in names if n in constant), min(constant))
        for letter in divided - {kept}:
            splits[letter] = None


def _held_together(letters: set[str], rule: Notation, layouts: Layouts, splits: dict[str, Dim]) -> bool:
    """Whether some operand is divided along all these letters, and nothing is summed along them."""
    if letters & rule.sums or any(isinstance(splits[letter], Rows) for letter in letters):
        return False
    return any(
        all(splits[n] == own for n, own in zip(o.letters, layout_of(layouts, o.node).dims, strict=True) if n in letters)
        and letters <= set(o.letters)
        and not o.via
        for o in rule.operands
    )


def _letters(rule: Notation) -> set[str]:
    return {letter for operand in rule.operands for letter in operand.letters if letter is not None}


def _sum_operands(rule: Notation, layouts: Layouts, splits: dict[str, Dim]) -> set[int]:
    """In each term of a sum that is left partial, the operand that must be (or is) a partial sum itself.

    None where the term is contracted over a split letter. Where no operand of a term is partial yet, its first one is
    asked to be: a term that is the same on every rank would be summed once per rank.
    """
    found = set()
    for term in rule.terms:
        names = {letter for i in term for letter in rule.operands[i].letters if letter is not None}
        if any(splits[letter] is not None for letter in names & rule.sums):
            continue
        inside = [i for i in sorted(term) if layout_of(layouts, rule.operands[i].node).partial]
        found.add(inside[0] if inside else min(term - rule.denominators))
    return found


def _rows(letter: str, rule: Notation, layouts: Layouts) -> set[Rows]:
    """Whose rows the operands run over along a letter."""
    found = set()
    for operand in rule.operands:
        dims = layout_of(layouts, operand.node).dims
        found |= {
            dim for name, dim in zip(operand.letters, dims, strict=True) if name == letter and isinstance(dim, Rows)
        }
    return found


def _combined(letter: str, rule: Notation, layouts: Layouts, mesh: Mesh) -> Dim:
    """What every operand with the letter can agree on; None where something would be held by no rank."""
    found: Split | None = None
    rows: Rows | None = None
    for operand in rule.operands:
        if letter not in operand.letters:
            continue
        split = layout_of(layouts, operand.node).dims[operand.letters.index(letter)]
        if split is None:
            continue
        if isinstance(split, Rows):
            rows = split
            continue
        via = dict(operand.via).get(letter)
        if via is not None:
            members = [set(indices.indices()) for indices in split.owned]
            split = Split(split.axes, tuple(IndexSet.of(i for i, j in enumerate(via) if j in m) for m in members))
        if found is None:
            found = split
        elif found != split:
            found = _both(found, split, mesh)
            if found is None:
                return None
    return None if found is not None and rows is not None else found or rows


def _both(one: Split, other: Split, mesh: Mesh) -> Split | None:
    """Where both are held, over the axes of both; None where an index that both have would be held by no rank."""
    axes = one.axes if one.axes == other.axes else in_order((*one.axes, *other.axes))
    try:
        places = points(mesh, axes)
    except PlanError:
        return None  # axes of two views
    both = tuple(one.at(mesh, place) & other.at(mesh, place) for place in places)
    return Split(axes, both) if _union(both) == _union(one.owned) & _union(other.owned) else None


def _union(sets: tuple[IndexSet, ...]) -> IndexSet:
    return functools.reduce(operator.or_, sets, IndexSet(()))


def _dim_split(operand: Operand, letter: str | None, splits: dict[str, Dim]) -> Dim:
    split = splits.get(letter) if letter is not None else None
    if split is None:
        return None
    via = dict(operand.via).get(letter or "")
    if via is None:
        return split
    if isinstance(split, Rows):
        return None
    owned = tuple(IndexSet.of(via[i] for i in indices.indices()) for indices in split.owned)
    size = operand.node.meta["val"].shape[operand.letters.index(letter)]
    return None if all(indices.size == size for indices in owned) else Split(split.axes, owned)


def _carried(rule: Notation, layouts: Layouts) -> frozenset[str]:
    """Axes over which the result stays a partial sum because its operands are, as far as the op is linear in them."""
    partial = {i: layout_of(layouts, o.node).partial for i, o in enumerate(rule.operands)}
    axes = frozenset[str]().union(*partial.values())
    linear_in = frozenset[int]().union(*rule.terms) - rule.denominators if rule.terms else frozenset[int]()
    if any(p and (p != axes or i not in linear_in) for i, p in partial.items()):
        return frozenset()
    return axes if all(sum(bool(partial[i]) for i in term) <= 1 for term in rule.terms) else frozenset()
