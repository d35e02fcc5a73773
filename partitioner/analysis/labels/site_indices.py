"""What the indices of a site depend on: runs of labels that follow each other, or else atoms, one by one.

    a vocabulary             ids {0} {1} {2} ...               one run
    gate and up rows         ids {0, 9} {1, 10} {2, 11} ...    two runs, side by side
    anything else            ids {0, 3} {1, 3} {2, 4} ...      `Atoms`

Tens of thousands of indices then are a few runs, and need not be looked at one by one.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import torch

from partitioner.analysis.labels.assign_owners import Atom
from partitioner.analysis.labels.label_state import Labels, Site

__all__ = ["Atoms", "runs_of"]


def runs_of(site: Site, labels: Labels) -> tuple[range, ...]:
    """The labels that the site's indices depend on, in order: index i on the i-th of each run. Each run lies within one
    dim of one weight, and none meets another. Empty where the site is not of this form.
    """
    ids = site.ids.reshape(-1)
    count = ids.numel()
    if not count:
        return ()
    if _follow(ids) and int(ids[0]) > 0 and int(ids[-1]) <= labels.count:
        return _apart([range(int(ids[0]) - 1, int(ids[0]) - 1 + count)], labels)
    firsts = labels.lattice.labels(int(ids[0]))
    if len(firsts) < 2 or max(firsts) >= labels.count or firsts == labels.lattice.labels(int(ids[-1])):
        return ()
    sets = [labels.lattice.labels(identity) for identity in ids.tolist()]
    if any(len(each) != len(firsts) for each in sets):
        return ()
    columns = torch.tensor([sorted(each) for each in sets]).unbind(1)
    if any(not _follow(column) or int(column[-1]) >= labels.count for column in columns):
        return ()
    return _apart([range(int(column[0]), int(column[0]) + count) for column in columns], labels)


def _follow(numbers: torch.Tensor) -> bool:
    """Whether each is the one before it and one."""
    return torch.equal(numbers, torch.arange(int(numbers[0]), int(numbers[0]) + numbers.numel()))


def _apart(runs: list[range], labels: Labels) -> tuple[range, ...]:
    """The runs, if each lies within one dim of one weight and none meets another."""
    bases = sorted(labels.bases.values())
    within = all(bisect_right(bases, run.start) == bisect_left(bases, run.stop) for run in runs)
    ordered = sorted(runs, key=lambda run: run.start)
    disjoint = all(one.stop <= other.start for one, other in itertools.pairwise(ordered))
    return tuple(runs) if within and disjoint else ()


@dataclass(frozen=True)
class Atoms:
    """The distinct atoms of a site by first appearance, and the place of each index among them."""

    sets: list[Atom]
    inverse: torch.Tensor

    @classmethod
    def of(cls, site: Site, labels: Labels) -> Atoms:
        ids, inverse = _distinct_in_order(site.ids)
        return cls([labels.lattice.labels(i) for i in ids], inverse)


def _distinct_in_order(ids: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Distinct ids by first appearance, each free index (id 0) by itself, and the place of each index among them."""
    if ids.numel() == torch.unique(ids).numel():
        return ids.tolist(), torch.arange(ids.numel())
    seen: dict[int, int] = {}
    found: list[int] = []
    inverse = []
    for i in ids.tolist():
        if i == 0 or i not in seen:
            seen[i] = len(found)
            found.append(i)
        inverse.append(seen[i])
    return found, torch.tensor(inverse, dtype=torch.int64)
