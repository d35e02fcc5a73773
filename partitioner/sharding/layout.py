"""Layouts: which part of a tensor each rank holds, and over which axes it is still a partial sum.

    None                      this dim is whole on every rank
    Split(("tp",), owned)     coordinate i along tp holds the indices owned[i] of this dim
    partial={"tp"}            the tensor is the sum over tp of what the ranks hold

Owned index sets may be uneven, may consist of several intervals (a fused projection) and may overlap (a kv head
shared by several ranks). A local tensor holds its owned indices in ascending order. Where a dim's size is a symbol
times a constant (`batch * heads` merged by a reshape), the split is that of the constant, inner factor.

The idea of one layout type for every sharding follows GSPMD (arXiv:2105.04663, section 3.1) and DTensor's placements;
index sets in place of even shards are what uneven and partially replicated splits need.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from partitioner.errors import LayoutError
from partitioner.sharding.index_set import IndexSet

__all__ = ["REPLICATED", "Layout", "Split"]


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

    def __str__(self) -> str:
        return f"{'x'.join(self.axes)}({', '.join(map(str, self.owned))})"


@dataclass(frozen=True)
class Layout:
    """The layout of one tensor; see the module's docstring."""

    dims: tuple[Split | None, ...]
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
        return tuple(i for i, dim in enumerate(self.dims) if dim is not None)

    def with_dim(self, dim: int, split: Split | None) -> Layout:
        dims = list(self.dims)
        dims[dim] = split
        return Layout(tuple(dims), self.partial)

    def __str__(self) -> str:
        text = "[" + ", ".join("*" if dim is None else str(dim) for dim in self.dims) + "]"
        return text + (f" partial over {', '.join(sorted(self.partial))}" if self.partial else "")


def REPLICATED(rank: int) -> Layout:  # noqa: N802 - reads as a constant of the given number of dims
    """Whole on every rank."""
    return Layout((None,) * rank)
