"""Sets over tensors: unions element by element and along dims, with large sets as groups."""

from __future__ import annotations

import torch

from partitioner.analysis.lattice import Ids, Lattice, compact


def expanded(lattice: Lattice, identity: int) -> frozenset[int]:
    return frozenset().union(*map(lattice.members, lattice.labels(identity)))


def test_union_is_that_of_sets() -> None:
    lattice = Lattice()
    a, b = lattice.singletons(torch.tensor([0, 1, 2])), lattice.singletons(torch.tensor([2, 1, 5]))
    merged = lattice.merge(a, b)
    assert [expanded(lattice, i) for i in merged.tolist()] == [{0, 2}, {1}, {2, 5}]
    assert torch.equal(lattice.merge(merged, torch.zeros(3, dtype=torch.int64)), merged)


def test_large_sets_are_groups_that_absorb_their_members() -> None:
    lattice = Lattice()
    row = lattice.singletons(torch.arange(100))
    whole = lattice.reduce(row, [0])
    again = lattice.merge(row, whole.expand(100))
    assert torch.unique(again).tolist() == whole.tolist()
    assert expanded(lattice, int(whole)) == frozenset(range(100))
    more = lattice.merge(whole, lattice.singletons(torch.tensor([200])))
    assert expanded(lattice, int(more)) == frozenset(range(100)) | {200}


def test_independent_dims_stay_apart_until_they_meet() -> None:
    lattice = Lattice()
    rows = Ids((lattice.singletons(torch.arange(4)).view(4, 1).expand(4, 3),))
    columns = Ids((lattice.singletons(torch.arange(10, 13)).expand(4, 3),))
    joined = lattice.join(rows, columns)
    assert joined is not None
    assert len(joined.terms) == 2
    assert joined.varying == [0, 1]
    along = lattice.union(joined, [1])
    assert along is not None
    vector = lattice.vector(along, 0)
    assert vector is not None
    assert [expanded(lattice, i) for i in vector.tolist()] == [{i, 10, 11, 12} for i in range(4)]


def test_free_is_nothing() -> None:
    lattice = Lattice()
    assert lattice.join(None, Ids((torch.zeros(2, 2, dtype=torch.int64),))) is None
    assert compact(torch.zeros(1).expand(5)).shape == (1,)
