"""What the fullest rank holds, against dealing atoms out by hand."""

import pytest

from partitioner.sharding.split_class import SplitClass


def by_hand(atoms: int, groups: int, ranks: int) -> int:
    sizes = [atoms // ranks + (rank < atoms % ranks) for rank in range(ranks)]
    most = start = 0
    for size in sizes:
        most = max(most, len({atom * groups // atoms for atom in range(start, start + size)}))
        start += size
    return most


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("atoms", "groups"), [(8, 8), (64, 8), (12, 4), (8, 1), (9, 3)])
def test_held_is_what_dealing_gives(atoms: int, groups: int, ranks: int) -> None:
    assert SplitClass(atoms, groups).held(ranks) == by_hand(atoms, groups, ranks)


def test_more_ranks_than_atoms_hold_all() -> None:
    assert SplitClass(6, 6).held(8) == 6
    assert SplitClass(64, 8).share(16) == 1 / 8
