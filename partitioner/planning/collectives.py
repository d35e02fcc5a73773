"""Seconds of a collective, by algorithm and message: measured curves inside a host, alpha and beta elsewhere.

    measured    t(bytes) = alpha + beta x bytes on each of three ranges of sizes, as NCCL has three protocols (LL,
                LL128, Simple); fitted to tables of 2, 4 and 8 GPUs (`benchmarks/planning/fit_collectives.py`)
    direct      all_reduce of GPUs that write into each other's memory, as `runtime/communication/peer_memory` and
                engines have it: curves of its own, and the smaller of it and NCCL's counts
    by formula  ring:  all_reduce 2 (n - 1) (alpha + m / n x beta), the others half of it
                tree:  all_reduce 2 log2(n) alpha + 2 m beta; the smaller of the two counts
    nested      a group over several dimensions: reduce-scatter inside, all-reduce of what is left outside, all-gather
                inside; an all-to-all sends (n - inner) / n of its bytes over the outer links

m is what nccl-tests calls the size: what a rank brings to an all-reduce, a reduce-scatter or an all-to-all, and what it
has after an all-gather. Ring and tree: Thakur, Rabenseifner, Gropp (2005); Sanders, Speck, Traeff (2009).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from partitioner.errors import InputError

__all__ = ["Curve", "FittedLinks", "Hop", "collective_seconds", "fitted_links", "formula_seconds"]

FITTED = Path(__file__).with_name("tables") / "collectives.json"
DIRECT = "direct_all_reduce"
HOST = 8
"""GPUs whose direct all-reduces were measured; more of them are not said to have it."""


@dataclass(frozen=True)
class Curve:
    """segments: (up to how many bytes, alpha in s, beta in s per byte), ascending; the last holds beyond."""

    segments: tuple[tuple[float, float, float], ...]

    def seconds(self, size: float) -> float:
        for upto, alpha, beta in self.segments:
            if size <= upto:
                return alpha + beta * size
        _, alpha, beta = self.segments[-1]
        return alpha + beta * size


@dataclass(frozen=True)
class FittedLinks:
    """Curves of one kind of host, by collective and number of GPUs."""

    name: str
    curves: Mapping[tuple[str, int], Curve]

    def seconds(self, kind: str, n: int, size: float) -> float | None:
        """None where the collective was not measured. Other numbers of GPUs go by the ratio of their ring's steps."""
        counts = sorted(count for known, count in self.curves if known == kind)
        if not counts:
            return None
        near = min(counts, key=lambda count: (abs(math.log(n / count)), count))
        found = self.curves[kind, near].seconds(size)
        if near == n:
            return found
        small = self.curves[kind, near].segments[0][1]
        steps = math.log2(n) / math.log2(near)  # start-up grows as a tree's depth, the rest as a ring's traffic
        return small * steps + max(found - small, 0.0) * ((n - 1) / n) / ((near - 1) / near)


@functools.cache
def fitted_links(name: str) -> FittedLinks | None:
    """The curves of a kind of host; None where none were measured."""
    systems = json.loads(FITTED.read_text(encoding="utf-8"))["systems"] if FITTED.is_file() else {}
    if name not in systems:
        return None
    curves = {
        (kind, int(count)): Curve(tuple((upto, alpha * 1e-6, beta * 1e-12) for upto, alpha, beta in segments))
        for kind, by_count in systems[name].items()
        for count, segments in by_count.items()
    }
    return FittedLinks(name, curves)


@dataclass(frozen=True)
class Hop:
    """The part of a group that lies in one dimension of the cluster: so many ranks (or groups of inner ones)."""

    n: int
    bytes_per_s: float
    latency_s: float
    fitted: str = ""


def formula_seconds(kind: str, n: int, size: float, *, bytes_per_s: float, latency_s: float) -> float:
    """By alpha and beta; see the module's docstring."""
    if n == 1:
        return 0.0
    if kind in ("permute", "send", "receive"):
        return latency_s + size / bytes_per_s
    ring = (n - 1) * (latency_s + size / n / bytes_per_s)
    if kind == "all_reduce":
        return min(2 * ring, 2 * math.ceil(math.log2(n)) * latency_s + 2 * size / bytes_per_s)
    if kind in ("all_gather", "reduce_scatter", "all_to_all"):
        return ring
    raise InputError(f"unknown collective {kind!r}")


def collective_seconds(kind: str, hops: Sequence[Hop], size: float) -> float:
    """Of a group that spans `hops`, innermost first."""
    hops = [hop for hop in hops if hop.n > 1]
    if not hops or not size:
        return 0.0
    if len(hops) == 1 or kind in ("permute", "send", "receive"):
        return _one(kind, hops[-1], size)
    inner, outer = hops[0], hops[1:]
    beyond = math.prod(hop.n for hop in outer)
    if kind == "all_to_all":
        n = inner.n * beyond
        return _one(kind, inner, size * (inner.n / n)) + collective_seconds(kind, outer, size * (n - inner.n) / n)
    part = size / inner.n
    if kind == "all_reduce":
        halves = _one("reduce_scatter", inner, size) + _one("all_gather", inner, size)
        return halves + collective_seconds(kind, outer, part)
    if kind == "all_gather":
        return collective_seconds(kind, outer, part) + _one(kind, inner, size)
    return _one(kind, inner, size) + collective_seconds(kind, outer, part)


def _one(kind: str, hop: Hop, size: float) -> float:
    links = fitted_links(hop.fitted) if hop.fitted else None
    found = links.seconds(kind, hop.n, size) if links is not None else None
    if found is not None and links is not None:
        direct = links.seconds(DIRECT, hop.n, size) if kind == "all_reduce" and hop.n <= HOST else None
        return found if direct is None else min(found, direct)
    return formula_seconds(kind, hop.n, size, bytes_per_s=hop.bytes_per_s, latency_s=hop.latency_s)
