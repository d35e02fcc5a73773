"""The mesh: which rank has which coordinates along the parallelism axes.

    attention    dp x pp x sp x tp         how attention and dense layers are divided
    experts      pp x edp x ep x etp       the same ranks of a stage, divided anew for routed experts

An *axis* belongs to the mesh, a *dim* to a tensor. Ranks are numbered row-major over `AXES`, so that neighbouring
ranks differ in `tp` first: tensor parallelism talks most and belongs on the fastest links (Megatron-LM,
arXiv:2104.04473, 3.2). Within a stage, number `(dp * SP + sp) * TP + tp` is read as `(edp * EP + ep) * ETP + etp`: that
experts divide the same ranks in their own way is Megatron Core's parallel folding (arXiv:2504.14960, section 3). `edp`
counts the copies of all experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from partitioner.errors import PlanError

__all__ = ["AXES", "DEGREES", "EXPERT_AXES", "MOST_RANKS", "Mesh", "require_degrees", "view_of"]

AXES = ("dp", "pp", "sp", "tp")
"""Mesh axes, slowest-varying first."""
EXPERT_AXES = ("pp", "edp", "ep", "etp")
"""The experts' view of the same ranks, in the order of their numbers within a stage."""
DEGREES = (*AXES, "ep", "etp")
"""What a plan says; `edp` follows."""
MOST_RANKS = 16_384
"""Of one mesh: what is computed rank by rank, as a report is, ends within seconds."""


def view_of(axes: tuple[str, ...]) -> tuple[str, ...]:
    """The view that has all of `axes`. Raises `PlanError` where they belong to two, or one is named twice."""
    for view in (AXES, EXPERT_AXES):
        if set(axes) <= set(view):
            if len(set(axes)) != len(axes):
                raise PlanError(f"an axis stands twice in {axes}")
            return view
    unknown = [axis for axis in axes if axis not in AXES and axis not in EXPERT_AXES]
    if unknown:
        raise PlanError(f"unknown mesh axis {unknown[0]!r}; the axes are {', '.join((*AXES, *EXPERT_AXES[1:]))}")
    raise PlanError(
        f"the axes {axes} belong to two views of the same ranks: {', '.join(AXES)} divide attention, "
        f"{', '.join(EXPERT_AXES)} divide experts; name axes of one of them"
    )


def require_degrees(sizes: Mapping[str, object]) -> None:
    """Raises `PlanError` where one of them, by itself, is no number of ranks along its axis."""
    for axis, size in sizes.items():
        if axis not in DEGREES:
            raise PlanError(f"unknown mesh axis {axis!r}; the axes are {', '.join(DEGREES)}")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise PlanError(f"{axis} must be a whole number of ranks, at least 1; got {size!r}")
        if size > MOST_RANKS:  # it may have more digits than Python prints
            raise PlanError(f"{axis} must be a whole number of ranks, at most {MOST_RANKS}; got a larger one")


@dataclass(frozen=True, slots=True)
class Mesh:
    """Sizes of the axes in the order of `AXES`; axes that are not named have size 1.

    ep, etp: the ranks that the experts of a stage are divided over, and that each expert's own matrices are.
    """

    sizes: tuple[int, ...]
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        if self.world_size > MOST_RANKS:
            degrees = " x ".join(f"{axis} {size}" for axis, size in self.degrees.items())
            raise PlanError(f"{degrees} is more than the {MOST_RANKS} ranks that a mesh may have")
        within = self.world_size // self.sizes[AXES.index("pp")]
        if within % (self.ep * self.etp):
            dp, _, sp, tp = self.sizes
            raise PlanError(
                f"ep x etp = {self.ep} x {self.etp} experts' ranks must divide the dp x sp x tp = {dp} x {sp} x {tp} = "
                f"{within} ranks of a stage, which they share out anew"
            )

    @classmethod
    def of(cls, **sizes: int) -> Mesh:
        require_degrees(sizes)
        return cls(tuple(sizes.get(axis, 1) for axis in AXES), sizes.get("ep", 1), sizes.get("etp", 1))

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    @property
    def degrees(self) -> dict[str, int]:
        """What was asked for: the axes with more than one rank, without those that follow from others."""
        return {axis: self._size(axis) for axis in DEGREES if self._size(axis) > 1}

    @property
    def single_axes(self) -> tuple[tuple[str, ...], ...]:
        """Each axis of attention's view with more than one rank, by itself."""
        return tuple((axis,) for axis, size in zip(AXES, self.sizes, strict=True) if size > 1)

    def size(self, *axes: str) -> int:
        """How many coordinates the given axes, of one view, have together."""
        view_of(axes)
        return math.prod(self._size(axis) for axis in axes)

    def _size(self, axis: str) -> int:
        if axis in AXES:
            return self.sizes[AXES.index(axis)]
        if axis == "edp":
            return self.world_size // (self.sizes[AXES.index("pp")] * self.ep * self.etp)
        return self.ep if axis == "ep" else self.etp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Along the axes of both views."""
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < self.world_size:
            raise PlanError(f"the ranks of this mesh are 0 to {self.world_size - 1}; got {rank!r}")
        found = _unravel(rank, AXES, self.sizes)
        axes = EXPERT_AXES[1:]
        return found | _unravel(self._within(found), axes, tuple(self._size(axis) for axis in axes))

    def _within(self, coordinates: Mapping[str, int]) -> int:
        """A rank's number within its stage."""
        return self._ravel(("dp", "sp", "tp"), coordinates)

    def rank(self, coordinates: Mapping[str, int]) -> int:
        """The rank at coordinates along the axes of one view; axes that are not named count as 0."""
        experts = [axis for axis in EXPERT_AXES[1:] if coordinates.get(axis)]
        if experts and not any(coordinates.get(axis) for axis in ("dp", "sp", "tp")):
            within = self._ravel(EXPERT_AXES[1:], coordinates)
            axes = ("dp", "sp", "tp")
            found = _unravel(within, axes, tuple(self._size(axis) for axis in axes))
            coordinates = found | {"pp": coordinates.get("pp", 0)}
        return self._ravel(AXES, coordinates)

    def _ravel(self, axes: tuple[str, ...], coordinates: Mapping[str, int]) -> int:
        number = 0
        for axis in axes:
            number = number * self._size(axis) + coordinates.get(axis, 0)
        return number

    def index(self, axes: tuple[str, ...], coordinates: Mapping[str, int]) -> int:
        """Row-major index of `coordinates` among all coordinates of `axes`, which are of one view."""
        index = 0
        for axis in axes:
            index = index * self._size(axis) + coordinates[axis]
        return index

    def at(self, axes: tuple[str, ...], index: int) -> dict[str, int]:
        """The coordinates along `axes` whose row-major index is `index`."""
        view_of(axes)
        return _unravel(index, axes, tuple(self._size(axis) for axis in axes))

    def group(self, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """The ranks that share with `rank` every coordinate of the axes' view except those along `axes`.

        In row-major order of `axes`.
        """
        view, mine = view_of(axes), self.coordinates(rank)
        fixed = {axis: mine[axis] for axis in view if axis not in axes}
        choices = [range(self._size(axis)) for axis in axes]
        return tuple(self.rank(fixed | dict(zip(axes, found, strict=True))) for found in itertools.product(*choices))

    def in_attention_view(self, axis: str) -> tuple[str, ...]:
        """An experts' axis by the axes of attention whose groups are the same, in the same order; else by itself.

        So a sum over experts and one over tp are one sum where they are over the same ranks. ep and etp divide the same
        weights: where one of them has no such axes, both go by their own names.
        """
        if axis in AXES:
            return (axis,)
        both = [each for each in ("ep", "etp") if self._size(each) > 1]
        if axis in both and any(self._same_groups(each) == (each,) for each in both):
            return (axis,)
        return self._same_groups(axis)

    def _same_groups(self, axis: str) -> tuple[str, ...]:
        order = EXPERT_AXES[1:]
        size, inner = self._size(axis), math.prod(self._size(each) for each in order[order.index(axis) + 1 :])
        found: tuple[str, ...] = ()
        for each in reversed(("dp", "sp", "tp")):
            if inner > 1:
                if inner % self._size(each):
                    return (axis,)
                inner //= self._size(each)
            elif size > 1 and self._size(each) > 1:
                if size % self._size(each):
                    return (axis,)
                size //= self._size(each)
                found = (each, *found)
        return found if size == 1 and found else (axis,)

    def __iter__(self) -> Iterator[dict[str, int]]:
        return (self.coordinates(rank) for rank in range(self.world_size))

    def __str__(self) -> str:
        return " x ".join(f"{axis} {size}" for axis, size in self.degrees.items()) or "one rank"


def _unravel(number: int, axes: tuple[str, ...], sizes: tuple[int, ...]) -> dict[str, int]:
    found = [0] * len(axes)
    for i in reversed(range(len(axes))):
        number, found[i] = divmod(number, sizes[i])
    return dict(zip(axes, found, strict=True))
