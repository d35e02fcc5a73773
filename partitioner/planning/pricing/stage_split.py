"""Layers in order, cut into stages so that the slowest is as fast as can be (linear partition, by bisection)."""

from __future__ import annotations

from collections.abc import Sequence

from partitioner.errors import PlanError

__all__ = ["split_layers"]


def split_layers(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """How many layers each stage has, at least one."""
    if stages < 1 or stages > len(costs):
        raise PlanError(f"{len(costs)} layers make no {stages} stages")
    low, high = max(costs), sum(costs)
    best = _fill(costs, stages, high)
    for _ in range(30):
        middle = (low + high) / 2
        found = _fill(costs, stages, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    assert best is not None
    return best


def _fill(costs: Sequence[float], stages: int, limit: float) -> tuple[int, ...] | None:
    """Each stage up to `limit`, leaving a layer for each that follows; None where that takes more stages."""
    found: list[int] = []
    start = 0
    for stage in range(stages):
        left = stages - 1 - stage
        count, load = 0, 0.0
        while start + count < len(costs) - left and (count == 0 or load + costs[start + count] <= limit * (1 + 1e-12)):
            load += costs[start + count]
            count += 1
        if load > limit * (1 + 1e-12):
            return None
        found.append(count)
        start += count
    return tuple(found) if start == len(costs) else None
