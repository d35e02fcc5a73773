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

import math
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from partitioner.analysis.cost.device import measure_link
from partitioner.planning.cluster import Device, Dimension
from partitioner.planning.kernels import Grid, Kernels
from runtime.communication.channels import Channel
from runtime.ops.kernels.native.few_rows import linear as product

__all__ = ["calibrate", "link_of", "window_seconds"]

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
    work()
    agree(0.0)
    start = clock()
    work()
    runs = max(1, math.ceil(seconds / max(agree(clock() - start), 1e-7)))
    found = math.inf
    for _ in range(windows):
        agree(0.0)
        start = clock()
        for _ in range(runs):
            work()
        found = min(found, agree((clock() - start) / runs))
    return found


def calibrate(
    agree: Callable[[float], float], clock: Callable[[], float] = time.perf_counter
) -> tuple[Kernels, Device]:
    """agree: from a rank's seconds to those of all, for which it waits; every rank calls it as often, in order."""

    def timed(work: Callable[[], object]) -> float:
        return window_seconds(work, agree, clock)

    matrix, one, square = torch.randn(4096, 4096), torch.randn(1, 4096), torch.randn(512, 512)
    speed = 4 * 4096**2 / timed(lambda: product(one, matrix))
    rates = {"float32": 2 * 512**3 / timed(lambda: product(square, square))}
    bare = Kernels("here", speed, rates, {})

    def linear(m: int, n: int, k: int) -> float:
        x = torch.randn(1 << m, 1 << k)
        # so many matrices that none is in a cache when its turn comes
        copies = [torch.randn(1 << n, 1 << k) for _ in range(min(64, 1 << (24 - n - k)))]
        turn = iter(range(1 << 30))
        seconds = timed(lambda: product(x, copies[next(turn) % len(copies)]))
        size = 4 * ((1 << (m + k)) + (1 << (n + k)) + (1 << (m + n)))
        return bare.roofline(2.0 * (1 << (m + n + k)), size, "float32") / seconds

    def decode(keys: int, heads: int) -> float:
        q = torch.randn(1, 1 << heads, 1, 64)
        k = torch.randn(1, 1 << heads, 1 << keys, 64)
        seconds = timed(lambda: functional.scaled_dot_product_attention(q, k, k))
        return bare.roofline(4.0 * 64 * (1 << (keys + heads)), 8.0 * 64 * (1 << (keys + heads)), "float32") / seconds

    grids = {
        ("linear", "float32"): Grid(
            (ROWS, WIDTHS, WIDTHS), [[[linear(m, n, k) for k in WIDTHS] for n in WIDTHS] for m in ROWS]
        ),
        ("decode", "float32"): Grid((KEYS, HEADS), [[decode(keys, heads) for heads in HEADS] for keys in KEYS]),
    }
    return Kernels("here", speed, rates, grids), Device("here", 8 << 30, 1 << 30, speed, rates, fuses=False)


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
