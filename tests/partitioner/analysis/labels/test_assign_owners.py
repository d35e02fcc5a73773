"""Who owns what: sets of indices from what was dealt to each rank."""

from __future__ import annotations

import torch

from partitioner.analysis.labels.assign_owners import Owned, dealt_indices, index_set
from partitioner.analysis.labels.index_sets import Lattice
from partitioner.sharding.index_set import IndexSet


def test_owned_labels_as_intervals_per_rank() -> None:
    owned = Owned(Lattice(), 6)
    owned.give(frozenset({0, 1, 4}), 0)
    owned.give(frozenset({1, 2, 3}), 1)
    assert owned.sets(0, 6, 3) == (IndexSet(((0, 2), (4, 5))), IndexSet(((1, 4),)), IndexSet(()))
    assert owned.sets(1, 4, 2) == (IndexSet(((0, 1),)), IndexSet(((0, 3),)))
    assert owned.common(frozenset({1}), 3) == 0b11
    assert owned.common(frozenset({1, 2}), 3) == 0b10
    assert owned.common(frozenset(), 3) == 0


def test_dealt_indices() -> None:
    found = dealt_indices(torch.tensor([5, 0, 1, 2]), torch.tensor([0, 1, 0, 1]), 3)
    assert found == (IndexSet(((1, 2), (5, 6))), IndexSet(((0, 1), (2, 3))), IndexSet(()))


def test_index_sets_from_flags() -> None:
    for flags in ([0, 1, 1, 0, 1], [1], [0, 0], [1, 1, 1], [1, 0, 1]):
        expected = IndexSet.of(i for i, flag in enumerate(flags) if flag)
        assert index_set(torch.tensor(flags, dtype=torch.bool)) == expected
