"""What a run of labels knows of values and finds: weights reached through moves, sites where labels end, collapses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, fx

from partitioner.analysis.labels.index_sets import Lattice

__all__ = ["Collapse", "Cut", "Labels", "Numbers", "Site", "WeightSlice", "WeightState"]


@dataclass(frozen=True)
class WeightState:
    """A weight reached through moves: for each dim of the weight, the index along it that each element came from."""

    name: str
    indices: tuple[Tensor, ...]


@dataclass(frozen=True)
class WeightSlice:
    """Indices along one dim of a weight."""

    name: str
    dim: int
    indices: Tensor


@dataclass(frozen=True)
class Site:
    """Where labels end: kind "contract" (with a weight: row-parallel), "reduce" (a sum) or "gather" (an output)."""

    node: fx.Node
    kind: str
    letter: str
    ids: Tensor
    """ids[K]: the set of labels that each index along the letter depends on."""
    weight: WeightSlice | None = None


@dataclass(frozen=True)
class Collapse:
    """An op that needs a whole labelled row, so that all its labels become one."""

    node: fx.Node
    can_be_partial: bool
    why: str
    """For the report: what needs the row."""
    weights: frozenset[str]
    """Those whose labels became one."""
    labels: frozenset[int] = frozenset()
    """The labels that became one, or are together in fewer groups than there are ranks."""


@dataclass(frozen=True)
class Cut:
    """How a weight whose scales are shared by blocks is cut, in atoms for each rank. even: as they would be dealt
    without blocks. divided: blocks that lie on both sides of a cut, of all weights that are cut with it.
    """

    even: tuple[int, ...]
    sizes: tuple[int, ...]
    divided: int


@dataclass
class Numbers:
    """The numbers of the labels: those of one dim of a weight follow each other."""

    bases: dict[tuple[str, int], int] = field(default_factory=dict)
    count: int = 0
    weights_of_label: dict[int, frozenset[str]] = field(default_factory=dict)
    """Of groups, as far as they were asked for."""

    def base(self, weight: str, dim: int, size: int) -> int:
        if (weight, dim) not in self.bases:
            self.bases[weight, dim] = self.count
            self.count += size
        return self.bases[weight, dim]


@dataclass
class Labels:
    """The result of one run, or of a part of one."""

    lattice: Lattice
    numbers: Numbers = field(default_factory=Numbers)
    """Of all labels, those of other runs among them."""
    sites: list[Site] = field(default_factory=list)
    collapses: list[Collapse] = field(default_factory=list)
    starts: dict[str, fx.Node] = field(default_factory=dict)
    """Weights whose indices are labels, in graph order, with the node that started them."""
    unsplit: dict[str, str] = field(default_factory=dict)
    """Weights that could start no labels, with the reason."""
    bases: dict[tuple[str, int], int] = field(default_factory=dict)
    """The first label of each dim of a weight that has labels in this run."""
    cuts: dict[str, Cut] = field(default_factory=dict)
    """Of weights that are quantised in blocks, once their indices are dealt out."""

    @property
    def count(self) -> int:
        """The labels that have a number: groups have larger ones."""
        return self.numbers.count

    def base(self, weight: str, dim: int, size: int) -> int:
        """First label of the weight's dim; its index i has label base + i."""
        return self.bases.setdefault((weight, dim), self.numbers.base(weight, dim, size))

    def add(self, later: Labels) -> None:
        """What the run has found behind this."""
        self.sites += later.sites
        self.collapses += later.collapses
        for name, node in later.starts.items():
            self.starts.setdefault(name, node)
        for name, why in later.unsplit.items():
            self.unsplit.setdefault(name, why)
        self.bases |= later.bases

    def joined(self, ids: Iterable[int]) -> frozenset[int]:
        """The labels in these sets, groups expanded."""
        return self.expanded({label for i in ids for label in self.lattice.labels(i)})

    def expanded(self, labels: Iterable[int]) -> frozenset[int]:
        """With the members of groups in place of these."""
        return frozenset(member for label in labels for member in self.lattice.members(label))

    def weights_of(self, ids: Iterable[int]) -> frozenset[str]:
        """The weights whose indices are in these sets."""
        starts = sorted((base, name) for (name, _), base in self.numbers.bases.items())
        firsts = [base for base, _ in starts]
        found: set[str] = set()
        ends = 0  # labels of one weight follow each other: one look-up for all of them
        for label in sorted({label for i in ids for label in self.lattice.labels(i)}):
            if label < ends:
                continue
            if label < self.count:
                place = bisect_right(firsts, label)
                ends = firsts[place] if place < len(firsts) else self.count
                found.add(starts[place - 1][1])
                continue
            known = self.numbers.weights_of_label
            if label not in known:
                names = {starts[bisect_right(firsts, member) - 1][1] for member in self.lattice.members(label)}
                known[label] = frozenset(names)
            found |= known[label]
        return frozenset(found)
