"""What came of the requests, in numbers: throughput, and percentiles of times, as a table and as a plot.

TTFT   seconds from a request to its first text
TPOT   seconds per token after that: (last - first) / (tokens - 1), of answers with several
whole  seconds from a request to its last text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partitioner.errors import InputError
from partitioner.serving.load.ask import Answered

__all__ = ["Measures", "write_plot"]


@dataclass(frozen=True)
class Measures:
    """Of all requests; times in seconds."""

    answered: tuple[Answered, ...]

    @property
    def good(self) -> list[Answered]:
        return [each for each in self.answered if not each.error]

    @property
    def wall_s(self) -> float:
        return max((each.last_s for each in self.good), default=0.0)

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all answers."""
        return sum(each.new_tokens for each in self.good) / self.wall_s if self.good else 0.0

    @property
    def times(self) -> dict[str, list[float]]:
        """Ascending, by what they measure."""
        several = [each for each in self.good if each.new_tokens > 1]
        return {
            "TTFT": sorted(each.first_s - each.asked_s for each in self.good),
            "TPOT": sorted((each.last_s - each.first_s) / (each.new_tokens - 1) for each in several),
            "whole": sorted(each.last_s - each.asked_s for each in self.good),
        }

    def rows(self) -> list[list[str]]:
        """What, mean, p50, p99; milliseconds."""
        return [
            [name, *(f"{1e3 * value:.1f}" for value in (sum(times) / len(times), *_percentiles(times)))]
            for name, times in self.times.items()
            if times
        ]

    def summary(self) -> str:
        failed = len(self.answered) - len(self.good)
        prompts = sum(each.prompt_tokens for each in self.good)
        new = sum(each.new_tokens for each in self.good)
        requests_per_s = len(self.good) / self.wall_s if self.good else 0.0
        return (
            f"{len(self.good)} answers in {self.wall_s:.2f} s, {failed} failed; {prompts} prompt tokens, "
            f"{new} new ones: {self.tokens_per_s:.1f} tokens/s, {requests_per_s:.2f} requests/s"
        )

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        times = {
            name: {"mean": sum(each) / len(each), "p50": _percentiles(each)[0], "p99": _percentiles(each)[1]}
            for name, each in self.times.items()
            if each
        }
        return {
            "answers": len(self.good),
            "failed": [each.error for each in self.answered if each.error],
            "wall_s": self.wall_s,
            "tokens_per_s": self.tokens_per_s,
            "seconds": times,
        }


def _percentiles(times: Sequence[float]) -> tuple[float, float]:
    """The median and the 99th percentile: the least value that so many are not above."""
    return times[(len(times) - 1) // 2], times[min(len(times) - 1, -(-99 * len(times) // 100) - 1)]


def write_plot(measures: Measures, path: str) -> None:
    """What share of the requests had each time at most, a curve for each kind."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise InputError("a plot needs matplotlib: pip install 'partitioner[page]'") from error
    figure = Figure(figsize=(9, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, times) in zip(figure.subplots(1, 3), measures.times.items(), strict=True):
        shares = [(place + 1) / len(times) for place in range(len(times))]
        axes.step([1e3 * value for value in times], shares, where="post")
        axes.set_title(name)
        axes.set_xlabel("ms")
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{measures.tokens_per_s:.1f} tokens/s")
    try:
        figure.savefig(Path(path))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write a plot to {path!r}: {error}") from error
