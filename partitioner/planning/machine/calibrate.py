"""Kernels of this machine's CPU, as engines call them, measured in a few seconds: what predicted times are made of.

    reads       a product with a matrix that no cache holds, by one row
    products    512 x 512 by 512 x 512
    linear      shares of the roofline by rows, columns and summed size, of matrices that are in no cache
    decode      attention of a token, by tokens in the cache and heads
    link        all-reduces of two sizes; and what one costs behind a product, as engines have them: ranks wait for the
                one that comes last

All ranks measure at the same time, since they share the machine's memory: in windows in which each has the same runs,
that begin together. Of the windows the least counts, and in it the rank that takes longest, as of steps.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from partitioner.analysis.cost.device import measure_link
from partitioner.planning.cluster import Device, Dimension
from partitioner.planning.kernels import Grid, Kernels
from runtime.communication.channels import Channel
from runtime.ops.kernels.native.few_rows import linear as product

__all__ = ["Calibration", "calibrate", "link_of", "window_seconds"]

_Kernel = tuple[Any, ...]
"""Its kind and sizes."""

ROWS, WIDTHS, KEYS, HEADS = (0, 1, 3, 6), (6, 8, 10, 12), (4, 6, 8, 10), (0, 2, 4, 6)
"""Logarithms of the sizes that are measured."""
BEHIND = (1024, 2048)
"""Columns and summed size of the product that an all-reduce stands behind."""


def window_seconds(
    work: Callable[[], object], agree: Callable[[float], float], clock: Callable[[], float], *, seconds: float = 0.012,
    windows: int = 3,
) -> float:  # fmt: skip
    """Seconds of a run, where all ranks do the same at the same time: the least of several windows' means.

    agree: from a rank's number to that of all, for which all wait. Windows have as many runs on each rank: work may
    communicate.
    """
    runs = runs_of_window(work, agree, clock, seconds=seconds)
    return min(window_of(work, runs, agree, clock) for _ in range(windows))


def runs_of_window(
    work: Callable[[], object], agree: Callable[[float], float], clock: Callable[[], float], *, seconds: float = 0.012
) -> int:
    """How many runs take so long, on all ranks alike."""
    work()
    agree(0.0)
    start = clock()
    work()
    return max(1, math.ceil(seconds / max(agree(clock() - start), 1e-7)))


def window_of(
    work: Callable[[], object], runs: int, agree: Callable[[float], float], clock: Callable[[], float]
) -> float:
    """Seconds of a run in one window."""
    agree(0.0)
    start = clock()
    for _ in range(runs):
        work()
    return agree((clock() - start) / runs)


class Calibration:
    """Kernels of this machine as they are over some minutes: each `measure` adds windows of every one of them.

    A machine with other work, or one that is warm, is not as fast now as a minute ago: what is predicted for a time is
    made of windows of that time. agree: from a rank's seconds to those of all, for which it waits; every rank calls
    all as often, in order. of_windows: what counts of all windows of a kernel.
    """

    def __init__(
        self, agree: Callable[[float], float], clock: Callable[[], float] = time.perf_counter, *,
        of_windows: Callable[[Sequence[float]], float] = min,
    ) -> None:  # fmt: skip
        self._agree, self._clock, self._of_windows = agree, clock, of_windows
        self._took: dict[_Kernel, list[float]] = {}
        self._runs: dict[_Kernel, int] = {}

    def measure(self, windows: int = 3) -> None:
        matrix, one, square = (torch.ones(shape) for shape in ((4096, 4096), (1, 4096), (512, 512)))
        self._time(("reads",), lambda: product(one, matrix), windows)
        self._time(("products",), lambda: product(square, square), windows)
        for m, n, k in itertools.product(ROWS, WIDTHS, WIDTHS):
            self._time_linear(m, n, k, windows)
        for keys, heads in itertools.product(KEYS, HEADS):
            self._time_attention(keys, heads, windows)

    def tables(self) -> tuple[Kernels, Device]:
        speed = 4 * 4096**2 / self._seconds("reads")
        rates = {"float32": 2 * 512**3 / self._seconds("products")}
        bare = Kernels("here", speed, rates, {})

        def linear(m: int, n: int, k: int) -> float:
            size = 4 * ((1 << (m + k)) + (1 << (n + k)) + (1 << (m + n)))
            return bare.roofline(2.0 * (1 << (m + n + k)), size, "float32") / self._seconds("linear", m, n, k)

        def decode(keys: int, heads: int) -> float:
            pairs = 64 * (1 << (keys + heads))
            return bare.roofline(4.0 * pairs, 8.0 * pairs, "float32") / self._seconds("decode", keys, heads)

        grids = {
            ("linear", "float32"): Grid(
                (ROWS, WIDTHS, WIDTHS), [[[linear(m, n, k) for k in WIDTHS] for n in WIDTHS] for m in ROWS]
            ),
            ("decode", "float32"): Grid((KEYS, HEADS), [[decode(keys, heads) for heads in HEADS] for keys in KEYS]),
        }
        return Kernels("here", speed, rates, grids), Device("here", 8 << 30, 1 << 30, speed, rates, fuses=False)

    def _time_linear(self, m: int, n: int, k: int, windows: int) -> None:
        x = torch.ones(1 << m, 1 << k)
        # so many matrices that none is in a cache when its turn comes
        copies = [torch.ones(1 << n, 1 << k) for _ in range(min(64, 1 << (24 - n - k)))]
        turn = itertools.cycle(copies)
        self._time(("linear", m, n, k), lambda: product(x, next(turn)), windows)

    def _time_attention(self, keys: int, heads: int, windows: int) -> None:
        q, k = torch.ones(1, 1 << heads, 1, 64), torch.ones(1, 1 << heads, 1 << keys, 64)
        self._time(("decode", keys, heads), lambda: functional.scaled_dot_product_attention(q, k, k), windows)

    def _time(self, kernel: _Kernel, work: Callable[[], object], windows: int) -> None:
        if kernel not in self._runs:
            self._runs[kernel] = runs_of_window(work, self._agree, self._clock)
        else:
            work()
        found = (window_of(work, self._runs[kernel], self._agree, self._clock) for _ in range(windows))
        self._took.setdefault(kernel, []).extend(found)

    def _seconds(self, *kernel: Any) -> float:
        return self._of_windows(self._took[kernel])


def calibrate(agree: Callable[[float], float]) -> tuple[Kernels, Device]:
    """Of now, as `Calibration` has them."""
    calibration = Calibration(agree)
    calibration.measure()
    return calibration.tables()


def link_of(
    channel: Channel, agree: Callable[[float], float], clock: Callable[[], float] = time.perf_counter
) -> Dimension:
    """Between the ranks of `channel`, by all-reduces of two sizes and behind a product; every rank calls this."""
    link = measure_link(channel, torch.device("cpu"))
    matrix, x, sent = torch.randn(BEHIND), torch.randn(1, BEHIND[1]), torch.zeros(1, BEHIND[0])

    def behind() -> None:
        product(x, matrix)
        channel.all_reduce(sent)

    alone = together = math.inf
    for _ in range(4):  # in turn: what else the machine does meets both alike
        alone = min(alone, window_seconds(lambda: product(x, matrix), agree, clock))
        together = min(together, window_seconds(behind, agree, clock))
    n, beta = len(channel.ranks), link.beta_s_per_byte
    # a ring's messages and bytes, as `measure_link` counts them
    alpha = (together - alone - 2 * (n - 1) / n * sent.nbytes * beta) / (2 * (n - 1))
    return Dimension("here", n, 1 / max(beta, 1e-13), max(link.alpha_s, alpha))
