"""Choices of experts that were left out, because the experts were full: counted in every run, and told.

    overflow.counts["model.layers.3.mlp.experts"]    [E] on the device, those of this rank's tokens since the start
    overflow.total                                   all of them

Counting is part of the graph as it is bound, without a word from the host, so that no run can leave choices out
unnoticed. A warning says so the first time, and whenever there are twice as many.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from runtime.ops.experts import kept_choices

__all__ = ["Overflow"]

_log = logging.getLogger("partitioner")


class Overflow:
    """Of one rank, of all programs that it runs."""

    def __init__(self) -> None:
        self.counts: dict[str, Tensor] = {}
        """By the path of the experts in the model."""
        self._choices: dict[str, int] = {}
        """How many there were in all."""
        self._told = 0

    @property
    def total(self) -> int:
        return sum(int(counts.sum()) for counts in self.counts.values())

    def bind(
        self, path: str, *, num_experts: int, capacity: float, device: torch.device
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`limit_experts`, which counts what it leaves out."""
        counts = self.counts.setdefault(path, torch.zeros(num_experts + 1, dtype=torch.int64, device=device))
        self._choices.setdefault(path, 0)

        def limited(index: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
            kept = kept_choices(index, num_experts=num_experts, capacity=capacity)
            left_out = (~kept).to(torch.int64).reshape(-1)
            counts.index_add_(0, index.reshape(-1).clamp(max=num_experts), left_out)
            self._choices[path] += index.numel()
            return torch.where(kept, index, num_experts), torch.where(kept, gates, 0)

        return limited

    def snapshot(self) -> dict[str, Tensor]:
        """[E] by path, on the host."""
        return {path: counts[:-1].clone().cpu() for path, counts in self.counts.items()}

    def tell(self) -> None:
        """After a run."""
        total = self.total
        if total and total >= 2 * self._told:
            self._told = total
            _log.warning(
                "experts were full: %d of %d choices were left out since the start, by expert-parallel.capacity; "
                "engine.routing() counts them by layer and expert",
                total,
                sum(self._choices.values()),
            )
