"""Kernels of this machine's CPU, as engines call them, measured in a few seconds: what predicted times are made of.

    reads       a product with a matrix that no cache holds, by one row
    products    512 x 512 by 512 x 512
    linear      shares of the roofline by rows, columns and summed size, of matrices that are in no cache
    decode      attention of a token, by tokens in the cache and heads

All ranks measure at the same time, since they share the machine's memory, and agree on each number.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn import functional

from partitioner.analysis.cost.device import measure_link
from partitioner.planning.cluster import Device, Dimension
from partitioner.planning.kernels import Grid, Kernels
from runtime.communication.channels import Channel
from runtime.ops.kernels.native.few_rows import linear as product

__all__ = ["block_seconds", "calibrate", "link_of"]

ROWS, WIDTHS, KEYS, HEADS = (0, 1, 3, 6), (6, 8, 10, 12), (4, 6, 8, 10), (0, 2, 4, 6)
"""Logarithms of the sizes that are measured."""


def block_seconds(
    work: Callable[[], object], clock: Callable[[], float], *, seconds: float = 0.004, blocks: int = 5
) -> float:
    """Of several blocks of runs, each as long as a step, the least mean of one: what steps are compared by, too."""
    work()
    runs, found = 1, float("inf")
    while blocks:
        start = clock()
        for _ in range(runs):
            work()
        took = clock() - start
        if took < seconds:
            runs *= 2
            continue
        found, blocks = min(found, took / runs), blocks - 1
    return found


def calibrate(
    agree: Callable[[float], float], clock: Callable[[], float] = time.perf_counter
) -> tuple[Kernels, Device]:
    """agree: from a rank's seconds to those of all; every rank calls it as often, in the same order."""
    agree(0.0)

    def timed(work: Callable[[], object]) -> float:
        return agree(block_seconds(work, clock))

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
    return Kernels("here", speed, rates, grids), Device("here", 8 << 30, 1 << 30, speed, rates)


def link_of(channel: Channel) -> Dimension:
    """Between the ranks of `channel`, by all-reduces of two sizes; every rank calls this."""
    link = measure_link(channel, torch.device("cpu"))
    return Dimension("here", len(channel.ranks), 1 / max(link.beta_s_per_byte, 1e-13), link.alpha_s)
