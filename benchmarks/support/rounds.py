"""Contestants take turns: in every round each runs once, so that whatever else the machine does meets all alike.

take_turns({"ours": f, "theirs": g}, rounds=50)   seconds per contestant, one entry a round
Ratio.of(times["ours"], times["theirs"])          of the medians; the quartiles of ours / theirs per round are the noise
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Ratio", "Took", "rounds_in", "take_turns"]

WARM_UP, FEWEST, MOST = 2, 5, 300

Run = Callable[[], object]


@dataclass(frozen=True)
class Took:
    """What a run returns of which only a part counts."""

    seconds: float


def nothing() -> None:
    pass


def take_turns(contestants: Mapping[str, Run], *, rounds: int, meet: Run = nothing) -> dict[str, list[float]]:
    """Seconds of each run, or what it says itself (`Took`). `meet` comes before each turn and is not counted: a
    barrier, where several ranks run together.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for at in range(rounds):
        # another one begins each round: what a turn leaves in caches and schedulers meets all alike too
        for name in names[at % len(names) :] + names[: at % len(names)]:
            run = contestants[name]
            meet()
            start = time.perf_counter()
            found = run()
            took = time.perf_counter() - start
            times[name].append(found.seconds if isinstance(found, Took) else took)
    return times


def rounds_in(seconds: float, contestants: Mapping[str, Run], *, meet: Run = nothing) -> int:
    """How many rounds fit into `seconds`; finding out is the warm-up."""
    times = take_turns(contestants, rounds=WARM_UP, meet=meet)
    once = sum(of_one[-1] for of_one in times.values())
    return max(FEWEST, min(MOST, int(seconds / once)))


@dataclass(frozen=True)
class Ratio:
    """See the module's docstring."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: list[float], theirs: list[float]) -> Ratio:
        low, _, high = statistics.quantiles((a / b for a, b in zip(ours, theirs, strict=True)), n=4)
        return cls(statistics.median(ours) / statistics.median(theirs), low, high)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.2f}..{self.high:.2f})"
