"""How far a dim can be split: what the fullest rank holds, at any number of ranks.

    atoms     what is dealt to ranks: query heads, columns of a feed-forward layer, entries of a vocabulary
    groups    distinct parts of the dim that atoms need: as many as atoms, or fewer where atoms share (kv heads)

    6 heads on 4 ranks                  atoms 6, groups 6: the fullest rank has 2 of 6
    64 heads, 8 kv heads on 16 ranks    atoms 64, groups 8: each rank has 4 heads, and 1 of 8 kv heads
    6 heads on 8 ranks                  fewer atoms than ranks: every rank has all

Atoms are counted as alike, and dealt in order, as evenly as can be.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SplitClass"]


@dataclass(frozen=True, order=True)
class SplitClass:
    """See the module's docstring."""

    atoms: int
    groups: int

    def held(self, ranks: int) -> int:
        """Of `groups`, how many the fullest of `ranks` ranks holds."""
        if ranks > self.atoms:
            return self.groups
        small, larger = divmod(self.atoms, ranks)
        if self.groups >= self.atoms:
            return -(-self.groups * (small + (larger > 0)) // self.atoms)
        most = start = 0
        for rank in range(ranks):
            end = start + small + (rank < larger)
            first, last = (each * self.groups // self.atoms for each in (start, end - 1))
            most, start = max(most, last - first + 1), end
        return most

    def share(self, ranks: int) -> float:
        """Of the whole, what the fullest rank holds."""
        return self.held(ranks) / self.groups
