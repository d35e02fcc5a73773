"""Plan: how many ranks along each axis, and what the user wants otherwise."""

from __future__ import annotations

from dataclasses import dataclass

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
        object.__setattr__(self, "keep_whole", tuple(self.keep_whole))
        object.__setattr__(self, "passes", tuple(self.passes))
        self.mesh  # noqa: B018 - checks the degrees

    @property
    def mesh(self) -> Mesh:
        return Mesh.of(tp=self.tp)
