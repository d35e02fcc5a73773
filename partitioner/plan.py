"""Plan: how many ranks along each axis, and what the user wants otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from partitioner.errors import PlanError
from partitioner.mesh import Mesh

__all__ = ["Plan"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """tp: tensor-parallel ranks. keep_whole: globs of weight names that stay whole on every rank.

    passes: names of further passes (entry points of the group "partitioner.passes"), run in order after the built-in
    ones.
    """

    tp: int = 1
    keep_whole: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("keep_whole", "passes"):
            given = getattr(self, name)
            if not isinstance(given, (tuple, list)) or not all(isinstance(each, str) for each in given):
                raise PlanError(f"{name} must be a list or tuple of names, such as [{str(given)!r}]; got {given!r}")
            object.__setattr__(self, name, tuple(given))
        self.mesh  # noqa: B018 - checks the degrees

    @property
    def mesh(self) -> Mesh:
        return Mesh.of(tp=self.tp)
