"""Sets over tensors: unions element by element and along dims, with large sets as groups."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from partitioner.analysis.labels import index_sets as module
from partitioner.analysis.labels.index_sets import Ids, Lattice, compact, expanded


def all_of(lattice: Lattice, identity: int) -> frozenset[int]:
    return frozenset().union(*map(lattice.members, lattice.labels(identity)))


def test_union_is_that_of_sets() -> None:
    lattice = Lattice()
    a, b = lattice.singletons(torch.tensor([0, 1, 2])), lattice.singletons(torch.tensor([2, 1, 5]))
    merged = lattice.merge(a, b)
    assert [all_of(lattice, i) for i in merged.tolist()] == [{0, 2}, {1}, {2, 5}]
    assert torch.equal(lattice.merge(merged, torch.zeros(3, dtype=torch.int64)), merged)


def test_large_sets_are_groups_that_absorb_their_members() -> None:
    lattice = Lattice()
    row = lattice.singletons(torch.arange(100))
    whole = lattice.reduce(row, [0])
    again = lattice.merge(row, whole.expand(100))
    assert torch.unique(again).tolist() == whole.tolist()
    assert all_of(lattice, int(whole)) == frozenset(range(100))
    more = lattice.merge(whole, lattice.singletons(torch.tensor([200])))
    assert all_of(lattice, int(more)) == frozenset(range(100)) | {200}


@pytest.mark.parametrize("many", [0, 100], ids=["many", "few"])
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(25, 60)), min_size=1, max_size=12),
    st.lists(st.integers(0, 130), max_size=6),
)
def test_what_a_group_stands_for_is_not_said_twice(
    many: int, groups: list[tuple[int, int]], singles: list[int]
) -> None:
    lattice = Lattice()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_MANY", many)
        sets = [frozenset(range(start, start + size)) for start, size in groups]
        ids = [int(lattice.reduce(lattice.singletons(torch.tensor(sorted(each))), [0])) for each in sets]
        ids += lattice.singletons(torch.tensor(singles, dtype=torch.int64)).tolist()
        assert all_of(lattice, lattice._union_of(frozenset(ids))) == frozenset(singles).union(*sets)
        left = lattice._absorbed(frozenset().union(*map(lattice.labels, ids)))
    assert frozenset().union(*map(lattice.members, left)) == frozenset(singles).union(*sets)
    for one in left:
        assert not any(lattice.members(one) <= lattice.members(other) for other in left - {one})


def test_thousands_of_groups_that_differ_in_little() -> None:
    """As where each head's channels depend on all of a state: to compare each with each would take minutes."""
    lattice = Lattice()
    state = lattice.singletons(torch.arange(256))
    channels = lattice.singletons(torch.arange(1000, 2500)).view(-1, 1)
    rows = lattice.merge(channels.expand(1500, 256), state.expand(1500, 256))
    each = lattice.reduce(rows, [1])
    assert torch.unique(each).numel() == 1500
    (whole,) = lattice.reduce(each, [0]).view(-1).tolist()
    assert all_of(lattice, whole) == frozenset(range(256)) | frozenset(range(1000, 2500))


def test_what_a_move_has_written_out_is_expanded_again() -> None:
    ids = torch.arange(6).view(2, 1, 3).expand(2, 4, 3)
    found = expanded(ids.contiguous())
    assert torch.equal(found, ids)
    assert compact(found).shape == (2, 1, 3)
    assert compact(expanded(torch.tensor([[1, 2], [1, 3]]))).shape == (2, 2)
    assert expanded(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)


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
    assert [all_of(lattice, i) for i in vector.tolist()] == [{i, 10, 11, 12} for i in range(4)]


def test_free_is_nothing() -> None:
    lattice = Lattice()
    assert lattice.join(None, Ids((torch.zeros(2, 2, dtype=torch.int64),))) is None
    assert compact(torch.zeros(1).expand(5)).shape == (1,)
