"""Which ranks hold which experts, and copies of which, so that all have about as much to do.

    counts [E]                  how many tokens chose each expert, of one layer or summed (`Engine.routing`)
    owners                      per rank its experts, ascending: `ExpertParallel(owners=...)`

Greedy, as DeepSeek's EPLB (github.com/deepseek-ai/EPLB): copies go one by one to the expert with the most tokens per
copy; then the heaviest copies are placed first, each with the rank that has least to do and a place left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from partitioner.errors import PlanError

__all__ = ["Owners", "balance", "deal", "imbalance"]

Owners = tuple[tuple[int, ...], ...]


def deal(num_experts: int, ranks: int) -> Owners:
    """Runs of experts, as even as can be; with fewer experts than ranks, each stands with several."""
    if num_experts < ranks:
        return tuple((rank * num_experts // ranks,) for rank in range(ranks))
    base, more = divmod(num_experts, ranks)
    ends = [rank * base + min(rank, more) for rank in range(ranks + 1)]
    return tuple(tuple(range(ends[rank], ends[rank + 1])) for rank in range(ranks))


def balance(counts: Sequence[float], ranks: int, extra: int = 0) -> Owners:
    """Owners of `len(counts)` experts and `extra` copies, as many on each rank as can be, give or take one."""
    num_experts = len(counts)
    if ranks < 1 or extra < 0 or num_experts < 1 or any(not count >= 0 or math.isinf(count) for count in counts):
        raise PlanError(
            f"balance takes counts of experts that are 0 or more, at least one rank and no fewer than 0 copies; got "
            f"{num_experts} counts, {ranks} ranks, {extra} copies"
        )
    if extra > num_experts * (ranks - 1):
        raise PlanError(f"{num_experts} experts on {ranks} ranks have room for {num_experts * (ranks - 1)} copies")
    copies = [1] * num_experts
    for _ in range(extra):
        # more copies than ranks would share a rank, which helps nobody
        at = max((e for e in range(num_experts) if copies[e] < ranks), key=lambda e: (counts[e] / copies[e], -e))
        copies[at] += 1
    total = num_experts + extra
    room = [total // ranks + (rank < total % ranks) for rank in range(ranks)]
    held: list[set[int]] = [set() for _ in range(ranks)]
    load = [0.0] * ranks
    pieces = sorted(((counts[e] / copies[e], e) for e in range(num_experts) for _ in range(copies[e])), reverse=True)
    for weight, expert in pieces:
        free = [rank for rank in range(ranks) if len(held[rank]) < room[rank] and expert not in held[rank]]
        if not free:
            _make_room(held, room, load, expert, counts, copies)
            free = [rank for rank in range(ranks) if len(held[rank]) < room[rank] and expert not in held[rank]]
        rank = min(free, key=lambda r: (load[r], r))
        held[rank].add(expert)
        load[rank] += weight
    return tuple(tuple(sorted(mine)) for mine in held)


def _make_room(
    held: list[set[int]], room: list[int], load: list[float], expert: int, counts: Sequence[float], copies: list[int]
) -> None:
    """The only places left are with ranks that have the expert: one of theirs goes to a rank that is full."""
    for giver in (rank for rank in range(len(held)) if len(held[rank]) < room[rank]):
        for taker in (rank for rank in range(len(held)) if expert not in held[rank]):
            movable = held[taker] - held[giver]
            if movable:
                moved = min(movable, key=lambda e: (counts[e] / copies[e], e))
                held[taker].remove(moved)
                held[giver].add(moved)
                load[taker] -= counts[moved] / copies[moved]
                load[giver] += counts[moved] / copies[moved]
                return


def imbalance(counts: Sequence[float], owners: Sequence[Sequence[int]]) -> float:
    """The largest rank's load over the mean, where the copies of an expert share its tokens evenly."""
    copies = [sum(expert in mine for mine in owners) for expert in range(len(counts))]
    load = [sum(counts[expert] / copies[expert] for expert in mine) for mine in owners]
    mean = sum(load) / len(load)
    return max(load) / mean if mean else 1.0
