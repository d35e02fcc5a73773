"""Seconds of kernels on a device: the roofline, divided by how much of it kernels of that size reach.

    linear      [m, k] x [n, k]      by rows, columns and summed size
    prefill     attention of texts   by length, and rows x heads
    decode      attention of a token by tokens in the cache, and rows x kv heads
    latent      the same over latents, with what is made of them, and heads
    experts     grouped linears      by rows of an expert, and the roofline's own seconds
    other       bytes                at the share of the memory's speed that copies reach

Shares are read off tables of measured kernels (`benchmarks/planning/fit_kernels.py` says which), linearly between
their points, which stand at logarithms of sizes. Where a device has no table, the same device's other dtypes, and then
a fixed share, are taken; `measured` says which it was.

Tables are of kernels that other engines run. `pricing.own_steps` says how fast whole steps of this product are.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["EXPANDING", "UNMEASURED", "Grid", "Grouped", "Kernels", "kernels_of"]

FITTED = Path(__file__).with_name("tables") / "kernels.json"
EXPANDING = "expanding"
"""In place of a dtype: products in 16 bits whose weights are codes of 4, expanded inside the kernel."""
UNMEASURED = {"linear": 0.7, "prefill": 0.5, "decode": 0.6, "experts": 0.5, "other": 0.8}
"""Shares of the roofline where nothing was measured: speed of light with a guess on it, and said so."""


@dataclass(frozen=True)
class Grid:
    """Shares at the points of a grid: `axes` are ascending logarithms (base 2), `values` nested lists."""

    axes: tuple[tuple[float, ...], ...]
    values: Any

    def at(self, *sizes: float) -> float:
        """Linear in each axis between its points, and constant beyond its ends."""
        values = [(1.0, self.values)]
        for axis, size in zip(self.axes, sizes, strict=True):
            x = min(max(math.log2(max(size, 1e-9)), axis[0]), axis[-1])
            right = next((i for i, point in enumerate(axis) if point >= x), len(axis) - 1)
            left = max(right - 1, 0)
            share = 1.0 if left == right else (x - axis[left]) / (axis[right] - axis[left])
            values = [
                (weight * part, value[i])
                for weight, value in values
                for i, part in ((left, 1 - share), (right, share))
                if part
            ]
        return float(sum(weight * value for weight, value in values))


@dataclass(frozen=True)
class Grouped:
    """The grouped linears of a layer's experts on one rank. rows: tokens of all its experts. hidden, inner: numbers of
    a token outside and inside an expert.
    """

    rows: float
    experts: float
    hidden: float
    inner: float
    flops: float
    num_bytes: float
    dtype: str


@dataclass(frozen=True)
class Kernels:
    """Of one kind of device. grids: by kind of kernel and dtype."""

    device: str
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    grids: Mapping[tuple[str, str], Grid]

    def measured(self, kind: str, dtype: str) -> bool:
        return (kind, dtype) in self.grids

    def _share(self, kind: str, dtype: str, *sizes: float) -> float:
        own = [dtype, *(known for k, known in self.grids if k == kind and known != EXPANDING)]
        grid = next((self.grids[kind, name] for name in own if (kind, name) in self.grids), None)
        return UNMEASURED[kind] if grid is None else grid.at(*sizes)

    def rate(self, dtype: str) -> float:
        """Products per second; of a dtype that the device has no figure for, those of the next wider one."""
        for name in (dtype, *_WIDER.get(dtype, ())):
            if name in self.flops_per_s:
                return self.flops_per_s[name]
        return min(self.flops_per_s.values())

    def roofline(self, flops: float, num_bytes: float, dtype: str) -> float:
        return max(flops / self.rate(dtype), num_bytes / self.bytes_per_s)

    def linear(self, m: float, n: float, k: float, num_bytes: float, dtype: str, *, table: str = "") -> float:
        """table: whose shares are taken, of `EXPANDING` kernels; those of dtype by default."""
        if not m * n * k:
            return 0.0
        return self.roofline(2 * m * n * k, num_bytes, dtype) / self._share("linear", table or dtype, m, n, k)

    def attention(
        self, *, rows: float, heads: float, kv_heads: float, queries: float, keys: float, flops: float,
        num_bytes: float, dtype: str, latent: bool = False,
    ) -> float:  # fmt: skip
        """latent: to one latent of each token, which queries are taken to and values are made of."""
        if not rows * heads:
            return 0.0
        kind: str
        sizes: tuple[float, ...]
        if queries > 1:
            kind, sizes = "prefill", (queries, rows * heads)
        elif latent and self.measured("latent", dtype):
            kind, sizes = "latent", (keys, rows, heads)
        else:
            kind, sizes = "decode", (keys, rows * kv_heads)
        return self.roofline(flops, num_bytes, dtype) / self._share(kind, dtype, *sizes)

    def experts(self, given: Grouped, *, table: str = "") -> float:
        """table: as of `linear`."""
        if not given.rows * given.experts:
            return 0.0
        light = self.roofline(given.flops, given.num_bytes, given.dtype)
        return light / self._share("experts", table or given.dtype, given.rows / given.experts, light * 1e6)

    def other(self, num_bytes: float) -> float:
        return num_bytes / self.bytes_per_s / self._share("other", "")


_WIDER: Mapping[str, Sequence[str]] = {
    "float8_e4m3fn": ("bfloat16", "float16"),
    "bfloat16": ("float16",),
    "float16": ("bfloat16",),
    "float32": (),
    "float64": ("float32",),
}


@functools.cache
def fitted_grids(device: str) -> Mapping[tuple[str, str], Grid]:
    """By kind of kernel and dtype; empty where the device has no table."""
    devices = json.loads(FITTED.read_text(encoding="utf-8"))["devices"] if FITTED.is_file() else {}
    return {
        (kind, dtype): Grid(tuple(map(tuple, found["axes"])), found["values"])
        for kind, by_dtype in devices.get(device, {}).items()
        for dtype, found in by_dtype.items()
    }


def kernels_of(device: str, bytes_per_s: float, flops_per_s: Mapping[str, float], *, fitted: str) -> Kernels:
    """fitted: the name of its tables, "" for none."""
    return Kernels(device, bytes_per_s, flops_per_s, fitted_grids(fitted) if fitted else {})
