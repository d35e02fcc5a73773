"""Seconds of one part of a model on one rank, op by op, as kernels run them.

    linear       what a product of its size takes; linears of one operand are one, as the runtime merges them
    experts      the grouped linears of a layer together: the tables measured them together, as one kernel
    attention    of a prompt or of a token, by its length
    other        element-wise ops between two products take one pass over the largest of their operands, since compiled
                 steps fuse them
    collective   what the links of its group take

Each kernel waits `LAUNCH_S` for the one before it. In steps that stream their weights (`StepShares`) what stands
between products and attention is part of them, but for norms of each head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from partitioner.analysis.cost.expressions import NodeExpression
from partitioner.analysis.cost.products import LATENT
from partitioner.planning.collectives import Hop, collective_seconds
from partitioner.planning.kernels import Grouped, Kernels
from partitioner.planning.pricing.own_steps import StepShares
from partitioner.planning.pricing.stored_format import ITEM, StoredFormat
from partitioner.planning.quantities import Seconds

__all__ = ["LAUNCH_S", "KernelTimes"]

_LATENT = {op.__name__ for op in LATENT}
_NORMS = frozenset({"rms_norm", "layer_norm"})
LAUNCH_S = 1.5e-6
"""From the end of a kernel to the start of the next one in a captured step."""


@dataclass
class _Product:
    """One or several nodes that are one kernel. weights: how many numbers of a matrix it reads."""

    node: NodeExpression
    rows: float
    columns: float
    summed: float
    flops: float
    moved: float
    weights: float


@dataclass
class KernelTimes:
    """Takes the ops of a part in order; `seconds` is complete after `end`. stored: how its matrices are kept, or None.

    held, met: experts of the rank, and how many of them have a row. cache_item: bytes of a number in the cache.
    own: of a step that streams its weights; None: each kernel by its table. reduces: the speed of all-reduces of such a
    step, over that of the tables.
    """

    kernels: Kernels
    links: Sequence[Hop]
    stored: StoredFormat | None
    held: float
    met: float
    cache_item: int = 0
    own: StepShares | None = None
    reduces: float = 1.0
    seconds: Seconds = field(default_factory=Seconds)
    _run: list[float] = field(default_factory=list)
    _products: dict[str, _Product] = field(default_factory=dict)
    _norms: int = 0
    """Behind the latest product of a new operand."""

    def other(self, node: NodeExpression, moved: float) -> None:
        self._norms += node.op in _NORMS
        if moved and self.own is None:
            self._run.append(moved)

    def end_run(self) -> None:
        if self._run:
            self.seconds.memory += self.kernels.other(max(self._run))
            self.seconds.waiting += LAUNCH_S
            self._run.clear()

    def collective(self, kind: str, size: float) -> None:
        share = self.reduces if kind == "all_reduce" and self.own is not None else 1.0
        self.seconds.link(kind, collective_seconds(kind, self.links, size) / share)

    def product(self, node: NodeExpression, sizes: Sequence[float], flops: float, moved: float) -> None:
        """Of a linear, of experts or of an attention."""
        if node.kind == "attention":
            self._attention(node, sizes, flops, moved)
            return
        rows, columns, summed = sizes
        weights = columns * summed * (self.met if node.kind == "experts" else 1)
        key = "experts" if node.kind == "experts" else f"of {node.source}"
        if key not in self._products:
            self._norms = 0
        known = self._products.setdefault(key, _Product(node, rows, 0, summed, 0, 0, 0))
        known.columns += columns
        known.flops += flops
        known.moved += moved
        known.weights += weights

    def end(self) -> Seconds:
        for each in self._products.values():
            self._matrices(each)
        self.end_run()
        return self.seconds

    def _matrices(self, product: _Product) -> None:
        node, kernels = product.node, self.kernels
        dtype, moved, table = node.dtype, product.moved, ""
        stored = self.stored
        if stored is not None and dtype == stored.dtype and stored.holds(experts=node.kind == "experts"):
            moved -= (ITEM[dtype] - stored.item) * product.weights
            dtype, table = stored.product_dtype or dtype, stored.table
        if self.own is not None:
            is_linear = node.kind == "linear"
            share = self.own.streamed if is_linear else self.own.experts
            self.seconds.memory += moved / kernels.bytes_per_s / share
            self.seconds.waiting += self.own.product_s if is_linear else self.own.experts_s
            return
        if node.kind == "linear":
            seconds = kernels.linear(product.rows, product.columns, product.summed, moved, dtype, table=table)
        else:
            inner = (product.columns - product.summed) / 2  # of gate, up and down together
            grouped = Grouped(product.rows, self.held, product.summed, inner, product.flops, moved, dtype)
            seconds = kernels.experts(grouped, table=table)
        self._spend(seconds, product.flops, moved, dtype)

    def _attention(self, node: NodeExpression, sizes: Sequence[float], flops: float, moved: float) -> None:
        rows, heads, kv_heads, size, queries, keys, _ = sizes
        if self.cache_item:  # keys and values are read from the cache as it holds them
            moved -= (ITEM[node.dtype] - self.cache_item) * rows * kv_heads * keys * size
        norms, self._norms = self._norms, 0
        if self.own is not None and node.op not in _LATENT:
            self.seconds.memory += moved / self.kernels.bytes_per_s / self.own.attention
            self.seconds.waiting += self.own.attention_s + norms * self.own.norm_s
            return
        seconds = self.kernels.attention(rows=rows, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys,
                                         flops=flops, num_bytes=moved, dtype=node.dtype,
                                         latent=node.op in _LATENT)  # fmt: skip
        self._spend(seconds, flops, moved, node.dtype)

    def _spend(self, seconds: float, flops: float, moved: float, dtype: str) -> None:
        self.seconds.waiting += LAUNCH_S
        if flops / self.kernels.rate(dtype) > moved / self.kernels.bytes_per_s:
            self.seconds.products += seconds
        else:
            self.seconds.memory += seconds
