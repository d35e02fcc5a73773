"""Who owns what: sets of indices from what was dealt to each rank."""

from __future__ import annotations

import pytest
import torch

from partitioner.analysis.labels.assign_owners import Owned, dealt_indices, divide, even_sizes
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
        assert IndexSet.where(torch.tensor(flags, dtype=torch.bool).numpy()) == expected


@pytest.mark.parametrize(("count", "ranks"), [(7, 3), (6, 3), (3, 3), (1, 1), (100, 64)])
def test_a_run_is_dealt_as_its_labels_one_by_one_would_be(count: int, ranks: int) -> None:
    run, single = Owned(Lattice(), count + 2), Owned(Lattice(), count + 2)
    atoms = [frozenset({label}) for label in range(1, count + 1)]
    places = divide(atoms, [0.0] * count, ranks, lambda label: 8.0)
    for atom, rank in zip(atoms, places, strict=True):
        single.give(atom, rank)
    found = run.give_runs([range(1, count + 1)], even_sizes(count, ranks))
    assert found.tolist() == places
    assert run.sets(0, count + 2, ranks) == single.sets(0, count + 2, ranks)


def test_a_run_that_is_dealt_in_part_already_is_left() -> None:
    owned = Owned(Lattice(), 5)
    owned.give(frozenset({3}), 1)
    assert not owned.can_give_runs([range(5)], 2)
    assert owned.can_give_runs([range(3)], 2)
    assert not owned.can_give_runs([range(2)], 3)  # fewer than ranks
