"""Layouts: which part of a tensor each rank holds, and over which axes it is still a partial sum.

    None                      this dim is whole on every rank
    Split(("tp",), owned)     coordinate i along tp holds the indices owned[i] of this dim
    Rows(("sp",), "sequence") this dim runs over the rows that a rank has, of those that the ranks of sp have together
    partial={"tp"}            the tensor is the sum over tp of what the ranks hold

Owned index sets may be uneven, may consist of several intervals (a fused projection) and may overlap (a kv head
shared by several ranks). A local tensor holds its owned indices in ascending order. Where a dim's size is a symbol
times a constant (`batch * heads` merged by a reshape), the split is that of the constant, inner factor.

Which rows a rank has, and how many, is known only when it runs: rows are compared by equality, never counted.

The idea of one layout type for every sharding follows GSPMD (arXiv:2105.04663, section 3.1) and DTensor's placements;
index sets in place of even shards are what uneven and partially replicated splits need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from partitioner.errors import LayoutError
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.mesh import AXES, EXPERT_AXES, Mesh

__all__ = ["REPLICATED", "Layout", "Rows", "Split", "in_order", "points"]


@dataclass(frozen=True)
class Split:
    """One dim divided over mesh axes: `owned[i]` belongs to the i-th coordinate (row-major) of `axes`."""

    axes: tuple[str, ...]
    owned: tuple[IndexSet, ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.axes, self.owned))

    def __hash__(self) -> int:
        return self._hash

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(indices.size for indices in self.owned)

    def at(self, mesh: Mesh, coordinates: Mapping[str, int]) -> IndexSet:
        """What the rank at `coordinates` holds."""
        return self.owned[mesh.index(self.axes, coordinates)]

    def __str__(self) -> str:
        return f"{'x'.join(self.axes)}({', '.join(map(str, self.owned))})"


@dataclass(frozen=True)
class Rows:
    """One dim that runs over a rank's own rows.

    kind: what they are, the name of a symbol in sizes ("sequence", "batch"); or "tokens", those of a flattened batch;
    or "routed", those that were sent to a rank's experts. order: in which they are dealt, "blocks" or "zigzag". of:
    the rows of fewer axes that these are rows of: a rank's own of a sequence, which ranks of another axis share out.
    """

    axes: tuple[str, ...]
    kind: str
    order: str = "blocks"
    of: Rows | None = None

    def __post_init__(self) -> None:
        if self.of is not None and not set(self.of.axes) < set(self.axes):
            raise LayoutError(f"rows over {self.axes} are no rows of {self.of}: required are its axes and more")

    @property
    def last_axes(self) -> tuple[str, ...]:
        """Those over which they were dealt out last: all, where they are rows of nothing else."""
        return self.axes if self.of is None else tuple(axis for axis in self.axes if axis not in self.of.axes)

    @property
    def levels(self) -> tuple[Rows, ...]:
        """Rows, rows of these, and so on."""
        return (self,) if self.of is None else (*self.of.levels, self)

    @property
    def by_dim(self) -> tuple[Rows, ...]:
        """A rank's own tokens of its own sequences: the two dims that one with both is merged of. Else these rows."""
        if self.of is None or self.of.kind != "batch" or self.kind != "sequence":
            return (self,)
        return (self.of, Rows(self.last_axes, self.kind, self.order))

    def again(self, axes: tuple[str, ...], kind: str, order: str = "blocks") -> Rows:
        """What dealing these out once more, over other axes, makes of them."""
        return Rows(in_order((*self.axes, *axes)), kind, order, self)

    def merged(self, other: Rows) -> Rows | None:
        """Of a dim that is merged of one with these and one with others; None where it is neither."""
        if self == other:
            return self
        for outer, inner in ((self, other), (other, self)):
            if (outer.kind, inner.kind) == ("batch", "sequence") and inner.of is None:
                return outer.again(inner.axes, inner.kind, inner.order)
        return None

    def __str__(self) -> str:
        order = "" if self.order == "blocks" else f" {self.order}"
        of = "" if self.of is None else f" of the {self.of}"
        return f"{self.kind} rows of {'x'.join(self.last_axes)}{order}{of}"


@dataclass(frozen=True)
class Layout:
    """The layout of one tensor; see the module's docstring."""

    dims: tuple[Split | Rows | None, ...]
    partial: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.partial and not self.partial.isdisjoint(
            axis for dim in self.dims if dim is not None for axis in dim.axes
        ):
            raise LayoutError(f"no tensor is both split and a partial sum over one axis: {self}")

    @cached_property
    def _hash(self) -> int:
        return hash((self.dims, self.partial))

    def __hash__(self) -> int:  # layouts are looked up far more often than made
        return self._hash

    @cached_property
    def is_replicated(self) -> bool:
        return not self.partial and all(dim is None for dim in self.dims)

    @property
    def split_dims(self) -> tuple[int, ...]:
        return tuple(i for i, dim in enumerate(self.dims) if isinstance(dim, Split))

    @property
    def splits(self) -> tuple[tuple[int, Split], ...]:
        """Each split dim with how it is split."""
        return tuple((i, dim) for i, dim in enumerate(self.dims) if isinstance(dim, Split))

    @property
    def row_dims(self) -> tuple[int, ...]:
        return tuple(i for i, dim in enumerate(self.dims) if isinstance(dim, Rows))

    @property
    def axes(self) -> frozenset[str]:
        """Those over which it is divided; not those of a partial sum."""
        return frozenset(axis for dim in self.dims if dim is not None for axis in dim.axes)

    def split(self, dim: int) -> Split | None:
        """How dim `dim` is split; None where it is whole. Raises `LayoutError` for rows, which have no indices."""
        found = self.dims[dim]
        if isinstance(found, Rows):
            raise LayoutError(f"dim {dim} of {self} runs over a rank's own rows, which are no indices of a whole")
        return found

    def with_dim(self, dim: int, split: Split | Rows | None) -> Layout:
        dims = list(self.dims)
        dims[dim] = split
        return Layout(tuple(dims), self.partial)

    def __str__(self) -> str:
        text = "[" + ", ".join("*" if dim is None else str(dim) for dim in self.dims) + "]"
        return text + (f" partial over {', '.join(sorted(self.partial))}" if self.partial else "")


def REPLICATED(rank: int) -> Layout:  # noqa: N802 - reads as a constant of the given number of dims
    """Whole on every rank."""
    return Layout((None,) * rank)


def in_order(axes: Iterable[str]) -> tuple[str, ...]:
    """Each axis once, slowest-varying first, so that equal sets of axes are written alike."""
    named = frozenset(axes)
    return tuple(axis for axis in dict.fromkeys((*AXES, *EXPERT_AXES)) if axis in named)


def points(mesh: Mesh, axes: tuple[str, ...]) -> list[dict[str, int]]:
    """The coordinates along `axes`, which are of one view, in row-major order."""
    return [mesh.at(axes, index) for index in range(mesh.size(*axes))]
