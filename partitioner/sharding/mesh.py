"""The mesh: which rank has which coordinates along the parallelism axes.

An *axis* belongs to the mesh, a *dim* to a tensor. Ranks are numbered row-major over `AXES`, so that neighbouring
ranks differ in `tp` first: tensor parallelism talks most and belongs on the fastest links (Megatron-LM,
arXiv:2104.04473, 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from partitioner.errors import PlanError

AXES = ("dp", "pp", "sp", "tp")
"""Mesh axes, slowest-varying first."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes of the axes in the order of `AXES`; axes that are not named have size 1."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, **sizes: int) -> Mesh:
        for axis, size in sizes.items():
            if axis not in AXES:
                raise PlanError(f"unknown mesh axis {axis!r}; the axes are {', '.join(AXES)}")
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise PlanError(f"{axis} must be a whole number of ranks, at least 1; got {size!r}")
        return cls(tuple(sizes.get(axis, 1) for axis in AXES))

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    def size(self, *axes: str) -> int:
        """How many coordinates the given axes have together."""
        return math.prod(self.sizes[AXES.index(axis)] for axis in axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < self.world_size:
            raise PlanError(f"the ranks of this mesh are 0 to {self.world_size - 1}; got {rank!r}")
        found: dict[str, int] = {}
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, found[axis] = divmod(rank, size)
        return {axis: found[axis] for axis in AXES}

    def rank(self, coordinates: Mapping[str, int]) -> int:
        rank = 0
        for axis, size in zip(AXES, self.sizes, strict=True):
            rank = rank * size + coordinates.get(axis, 0)
        return rank

    def index(self, axes: tuple[str, ...], coordinates: Mapping[str, int]) -> int:
        """Row-major index of `coordinates` among all coordinates of `axes`."""
        index = 0
        for axis in axes:
            index = index * self.size(axis) + coordinates[axis]
        return index

    def group(self, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """The ranks that share every coordinate with `rank` except those along `axes`, in row-major order of `axes`."""
        mine = self.coordinates(rank)
        return tuple(
            other
            for other in range(self.world_size)
            if all(c == mine[axis] for axis, c in self.coordinates(other).items() if axis not in axes)
        )

    def __iter__(self) -> Iterator[dict[str, int]]:
        return (self.coordinates(rank) for rank in range(self.world_size))
