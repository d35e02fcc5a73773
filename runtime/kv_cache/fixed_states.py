"""States per sequence at one place in memory, for steps that are compiled or captured once and then replayed.

    settle(buffers)     moves the states there, before such a step: runs of many tokens put new tensors in their place
    copies(), restore() what they hold, and that again: a step that is only tried must not count

A captured step reads a state where it wrote it last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["FixedStates", "write_active"]


class FixedStates:
    """Of the states in `shapes`, by name; see the module's docstring."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self._shapes = shapes
        self._held: dict[str, Tensor] = {}

    def settle(self, buffers: dict[str, Tensor]) -> None:
        """Afterwards the buffers of these states are the ones that stay."""
        for name, shape in self._shapes.items():
            given = buffers[name]
            if name not in self._held:
                self._held[name] = given.new_zeros(tuple(shape))
            held = self._held[name]
            if given is not held:
                held[: len(given)].copy_(given)
                buffers[name] = held

    def copies(self) -> dict[str, Tensor]:
        return {name: held.clone() for name, held in self._held.items()}

    def restore(self, copies: Mapping[str, Tensor]) -> None:
        for name, copy in copies.items():
            self._held[name].copy_(copy)


def write_active(held: Tensor, value: Tensor, active: Tensor) -> None:
    """In place: rows that are not active keep what they have."""
    held.copy_(torch.where(active.view(-1, *([1] * (value.dim() - 1))), value.to(held.dtype), held))
