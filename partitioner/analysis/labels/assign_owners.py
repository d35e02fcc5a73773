"""Dividing atoms over ranks: contracted indices with the same source set go together, balanced by the largest load.

An atom is a set of weight indices that must meet on one rank (a head with its kv head, a gate row with its up row).
Atoms are dealt in graph order to ranks in order, every rank at least one; a weight index belongs to every rank that
has an atom which needs it, so that a kv head shared by more query heads than one rank holds lives on several.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from partitioner.analysis.labels.index_sets import Lattice
from partitioner.sharding.index_set import IndexSet

__all__ = ["Owned", "dealt_indices", "divide", "even_sizes", "loads_of"]

Atom = frozenset[int]


def divide(atoms: list[Atom], extra: list[float], ranks: int, cost: Callable[[int], float]) -> list[int]:
    """The rank of each atom, non-decreasing. `extra[i]`: the load of atom i beside its sources; `cost(label)`: of a
    source.

    Minimises the largest load, where a rank's load counts each source once. Needs at least as many atoms as ranks.
    """
    count = len(atoms)
    assert count >= ranks
    loads = [sum(map(cost, atom)) + e for atom, e in zip(atoms, extra, strict=True)]
    disjoint = sum(map(len, atoms)) == len(frozenset[int]().union(*atoms))
    if disjoint and max(loads) - min(loads) <= 1e-9 * max(loads):
        return [rank for rank, size in enumerate(even_sizes(count, ranks)) for _ in range(size)]
    low, high = max(loads), sum(loads)
    best = _fill(atoms, extra, ranks, cost, high)
    assert best is not None
    for _ in range(24):
        middle = (low + high) / 2
        found = _fill(atoms, extra, ranks, cost, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
        if high - low <= 1e-6 * high:
            break
    return best


def even_sizes(count: int, ranks: int) -> list[int]:
    """How many each rank has of `count`: the first ones have one more."""
    small, larger = divmod(count, ranks)
    return [small + (rank < larger) for rank in range(ranks)]


def _fill(
    atoms: list[Atom], extra: list[float], ranks: int, cost: Callable[[int], float], limit: float
) -> list[int] | None:
    """Ranks filled one after the other up to `limit`, leaving at least one atom for each later rank; None if too
    small.
    """
    found: list[int] = []
    rank, load = 0, 0.0
    held: set[int] = set()
    for i, atom in enumerate(atoms):
        more = sum(map(cost, _missing(atom, held))) + extra[i]
        full = load + more > limit * (1 + 1e-12)
        needed_later = len(atoms) - i <= ranks - 1 - rank
        if found and found[-1] == rank and (full or needed_later):
            rank += 1
            if rank == ranks:
                return None
            held, load = set(), 0.0
            more = sum(map(cost, atom)) + extra[i]
        held |= atom
        load += more
        found.append(rank)
    return found


def _missing(atom: Atom, held: set[int]) -> Iterable[int]:
    return (label for label in atom if label not in held)


def loads_of(
    atoms: Sequence[Atom], extra: Sequence[float], cost: Callable[[int], float]
) -> Callable[[int, int], float]:
    """The load of a rank that has the atoms from one to another; see `divide`."""
    if sum(map(len, atoms)) == len(frozenset[int]().union(*atoms)):
        each = (sum(map(cost, atom)) + more for atom, more in zip(atoms, extra, strict=True))
        ends = list(itertools.accumulate(each, initial=0.0))
        return lambda first, last: ends[last] - ends[first]
    return lambda first, last: sum(map(cost, frozenset[int]().union(*atoms[first:last]))) + sum(extra[first:last])


class Owned:
    """The ranks that own each label, as bits; a group's owners own its members."""

    def __init__(self, lattice: Lattice, count: int) -> None:
        self._lattice = lattice
        self._masks = [0] * count
        self._groups: dict[int, int] = {}

    def give(self, atom: Atom, rank: int) -> None:
        for label in atom:
            if label >= len(self._masks):
                self._groups[label] = self._groups.get(label, 0) | 1 << rank
            for member in (label,) if label < len(self._masks) else self._lattice.members(label):
                self._masks[member] |= 1 << rank

    def can_give_runs(self, runs: Sequence[range], ranks: int) -> bool:
        """Whether runs of labels, as many in each, are as many as ranks and no rank owns one already."""
        return len(runs[0]) >= ranks and not any(any(self._masks[run.start : run.stop]) for run in runs)

    def give_runs(self, runs: Sequence[range], sizes: Sequence[int]) -> Tensor:
        """Deals runs of labels, `sizes` of each in order, as to atoms that hold one label of each: the rank of each
        atom.
        """
        for run in runs:
            self._masks[run.start : run.stop] = [1 << rank for rank, size in enumerate(sizes) for _ in range(size)]
        return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))

    def common(self, atom: Atom, ranks: int) -> int:
        """The ranks that own all of an atom already."""
        common = (1 << ranks) - 1 if atom else 0
        for label in atom:
            common &= self._masks[label] if label < len(self._masks) else self._groups.get(label, 0)
            if not common:
                break
        return common

    def sets(self, start: int, stop: int, ranks: int) -> tuple[IndexSet, ...]:
        """Per rank the labels from `start` to `stop` that it owns, counted from `start`."""
        intervals: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        end = 0
        for mask, run in itertools.groupby(self._masks[start:stop]):
            begin, end = end, end + len(list(run))
            for rank, mine in enumerate(intervals):
                if mask >> rank & 1:
                    touches = bool(mine) and mine[-1][1] == begin
                    mine.append((mine.pop()[0] if touches else begin, end))
        return tuple(IndexSet(tuple(mine)) for mine in intervals)


def dealt_indices(indices: Tensor, rank_of: Tensor, ranks: int) -> tuple[IndexSet, ...]:
    """Per rank the indices that were dealt to it: `rank_of[i]` has `indices[i]`."""
    flags = torch.zeros(ranks, int(indices.max()) + 1, dtype=torch.bool)
    flags[rank_of, indices] = True
    return tuple(map(IndexSet.where, flags.numpy()))
