"""What choosing a plan by predictions costs: "most tokens per second per GPU with TPOT at most 15, 25, 40 ms".

A case is a model, engine, system, format and lengths, with rows of several numbers of GPUs and batches, and a limit
that at least one of them keeps. Its best row is the one that was measured best; the regret is the share of the best
row's tokens per second per GPU that a choice lacks.

    among those that keep it    the limit is checked on the measured times, the choice is by predicted ones
    smallest that keeps it      the fewest GPUs among these, and their best batch
    all by predictions          limits are predicted too; a choice that breaks its limit when measured has lost all
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.planning.silicon.rows import Row
from partitioner.planning.pricing.batching import Served

__all__ = ["print_regrets"]

LIMITS_S = (0.015, 0.025, 0.04)
Case = list[tuple[Row, float]]
"""Rows, and the predicted time per token of each."""


def cases(rows: Sequence[Row], served: Sequence[Served]) -> list[tuple[Case, float]]:
    groups: dict[tuple[object, ...], Case] = defaultdict(list)
    for row, each in zip(rows, served, strict=True):
        groups[row.group].append((row, each.tpot_s))
    several = [case for case in groups.values() if len({row.gpus for row, _ in case}) > 1]
    return [(case, limit) for case in several for limit in LIMITS_S if any(row.tpot <= limit for row, _ in case)]


def regrets(case: Case, limit: float) -> dict[str, float]:
    """By how the plan is chosen."""

    def rate(each: tuple[Row, float]) -> float:
        return each[0].batch / each[1] / each[0].gpus

    kept = [each for each in case if each[0].tpot <= limit]
    best = max(row.tokens_per_s for row, _ in kept)
    fewest = min(row.gpus for row, _ in kept)
    promised = [each for each in case if each[1] <= limit] or [min(case, key=lambda each: each[1])]
    blind = max(promised, key=rate)[0]
    return {
        "among those that keep it": 1 - max(kept, key=rate)[0].tokens_per_s / best,
        "smallest that keeps it": 1 - max(row.tokens_per_s for row, _ in kept if row.gpus == fewest) / best,
        "all by predictions": 1 - (blind.tokens_per_s if blind.tpot <= limit else 0.0) / best,
    }


def print_regrets(rows: Sequence[Row], served: Sequence[Served], *, title: str = "") -> None:
    found = [regrets(case, limit) for case, limit in cases(rows, served)]
    limits = ", ".join(f"{limit * 1e3:.0f}" for limit in LIMITS_S)
    print(f"most tokens/s per GPU with TPOT at most {limits} ms, {len(found)} cases{title}")
    for name in found[0] if found else ():
        mine = [each[name] for each in found]
        within = sum(each <= 0.05 for each in mine) / len(mine)
        print(f"  {name:26} regret {statistics.fmean(mine):5.1%} in the mean, {within:4.0%} within 5%")
