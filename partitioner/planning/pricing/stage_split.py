"""Layers in order, cut into stages so that the slowest is as fast as can be (linear partition, by bisection)."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

from partitioner.errors import PlanError
from partitioner.program.plan import Plan

__all__ = ["asked_head", "slowest_of", "split_layers"]


def split_layers(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """How many layers each stage has, at least one."""
    if stages < 1 or stages > len(costs):
        raise PlanError(f"{len(costs)} layers make no {stages} stages")
    until = list(itertools.accumulate(costs, initial=0.0))
    low, high = max(costs), until[-1]
    best = _fill(until, stages, high)
    for _ in range(30):
        middle = (low + high) / 2
        found = _fill(until, stages, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    assert best is not None
    return best


def _fill(until: Sequence[float], stages: int, limit: float) -> tuple[int, ...] | None:
    """Each stage up to `limit`, leaving a layer for each that follows; None where that takes more stages.

    until: the costs of all layers before each.
    """
    most = limit * (1 + 1e-12)
    found: list[int] = []
    start = 0
    for left in range(stages - 1, -1, -1):
        end = bisect_right(until, until[start] + most) - 1
        end = max(start + 1, min(end, len(until) - 1 - left))
        if until[end] - until[start] > most:
            return None
        found.append(end - start)
        start = end
    return tuple(found) if start == len(until) - 1 else None


def slowest_of(costs: Sequence[float], stages: int) -> float:
    """What the slowest stage takes."""
    ends = list(itertools.accumulate(split_layers(costs, stages))) if len(costs) > stages else range(1, len(costs) + 1)
    return max(sum(costs[start:end]) for start, end in itertools.pairwise([0, *ends]))


def asked_head(plan: Plan) -> bool | None:
    """What a plan says of the vocabulary head, as an option of the pass `pipeline` or in that pass itself."""
    for each in plan.passes:
        if isinstance(each, tuple) and each[0] == "pipeline":
            found = dict(each[1]).get("share_head")
            return None if found is None else bool(found)
        if not isinstance(each, (str, tuple)) and each.name == "pipeline":
            return None if (told := vars(each).get("share_head")) is None else bool(told)
    return None
