"""Bytes of the fullest rank under a plan: weights as they are kept, caches, results alive at once, exchanges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from partitioner.analysis.cost.expressions import EXPERTS
from partitioner.planning.cluster import Device
from partitioner.planning.pricing.evaluate import Evaluated
from partitioner.planning.pricing.sequences import Attending
from partitioner.planning.pricing.stored_format import ITEM, StoredFormat
from partitioner.planning.quantities import Memory, Workload, runs_of
from partitioner.planning.summary import Summary
from partitioner.program.plan import Plan
from runtime.execution.fusion.operations import LEAST_ROWS
from runtime.kv_cache.device_memory import require_dtype

__all__ = ["HeldBytes"]


class HeldBytes(Evaluated):
    """device: that a rank has. stored, cache_dtype: as of `Pricer`."""

    def __init__(self, summary: Summary, device: Device, stored: StoredFormat | None, cache_dtype: str | None) -> None:
        super().__init__(summary)
        require_dtype(cache_dtype)
        self.usable, self.fuses = device.usable_bytes, device.fuses
        self.stored, self.cache_dtype = stored, cache_dtype
        self.cache_item = 0 if cache_dtype is None else 1

    def memory(self, plan: Plan, workload: Workload, layers: Sequence[int], *, shares_head: bool = False) -> Memory:
        """shares_head: whether all stages have their rows of the vocabulary head, or the last one has them all."""
        summary = self.summary
        rows = -(-workload.batch // plan.mesh.size("dp"))
        numbers, caches = self._held_parts(plan, -(-(workload.prompt + workload.new) // plan.sp))
        head = self._head_bytes(plan, shares_head=shares_head)
        stages, start = [], 0
        for stage, count in enumerate(layers):
            mine = Counter(summary.order[start : start + count])
            start += count
            mine[summary.first] += stage == 0
            weights, cache = (sum(each[part] * times for part, times in mine.items()) for each in (numbers, caches))
            weights += head if shares_head or stage == len(layers) - 1 else 0.0
            stages.append((weights, rows * cache))
        weights, cache = max(stages, key=sum)
        run_rows, length, _ = runs_of(workload, rows)
        own = -(-length // plan.sp)
        activations = max(self._peak(part, plan, run_rows, own) for part in set(summary.order) | {summary.last})
        in_flight = 2 if plan.pp > 1 else 1
        buffers = 2.0 * in_flight * run_rows * own * summary.hidden_bytes
        if plan.sp > 1:  # keys and values of other ranks: of all tokens so far where they come at once
            given = self._values(plan, run_rows, length, workload.prompt - length)
            buffers += max(self._held_keys(part, plan, given) for part in set(summary.order))
        return Memory(weights, cache, activations, buffers, self.usable)

    def _held_parts(self, plan: Plan, tokens: int) -> tuple[list[float], list[float]]:
        """Bytes of each part on the fullest rank: its weights, and what it keeps of one sequence of so many tokens."""
        key = ("held parts", plan.tp, plan.ep, plan.etp, tokens)
        if key not in self._costs:
            values, parts = self._values(plan, 1, 1, 0, alike=True), range(len(self.summary.parts))
            self._costs[key] = (
                [self._weights(part, values) for part in parts],
                [self._cache(part, values, tokens) for part in parts],
            )
        found: tuple[list[float], list[float]] = self._costs[key]
        return found

    def _head_bytes(self, plan: Plan, *, shares_head: bool) -> float:
        """Of what stands behind the layers, on a rank that has it; with stages, a table that the first one has, too."""
        key = ("head", plan.tp, plan.pp, shares_head)
        if key not in self._costs:
            values = self._values(plan, 1, 1, 0, alike=True)
            given = self._over_stages(plan, values) if shares_head else values
            found = self._weights(self.summary.last, given)
            if plan.pp > 1:
                found += self._number("tied", self.summary.parts[self.summary.last].tied, given)
            self._costs[key] = found
        return float(self._costs[key])

    def _weights(self, part: int, values: Mapping[Any, float]) -> float:
        key = ("weights", part)
        wanted = [self.summary.parts[part].weight_bytes] if key not in self._functions else []
        found = float(self._function(key, wanted)(*self._given(values))[0])
        inside = part not in (self.summary.first, self.summary.last)
        return found - self._saved(part, values, self.stored) if self.stored is not None and inside else found

    def _saved(self, part: int, values: Mapping[Any, float], stored: StoredFormat) -> float:
        """Bytes that matrices take less than in the model's own dtype."""
        key = ("saved", part)
        wanted = []
        for node in self.summary.parts[part].nodes["decode"] if key not in self._functions else ():
            experts = node.kind == "experts"
            if node.kind in ("linear", "experts") and node.dtype == stored.dtype and stored.holds(experts=experts):
                wanted.append(node.product[1] * node.product[2] * (EXPERTS if experts else 1))
        numbers = self._function(key, wanted)(*self._given(values))
        return float(sum(numbers)) * (ITEM[stored.dtype] - stored.item)

    @property
    def num_bytes(self) -> int:
        """Of all weights as they are kept, whole."""
        if self.stored is None:
            return self.summary.num_bytes
        values = self._values(Plan(), 1, 1, 0)
        return self.summary.num_bytes - round(
            sum(self._saved(part, values, self.stored) for part in self.summary.order)
        )

    def _cache(self, part: int, values: Mapping[Any, float], tokens: int) -> float:
        total = 0.0
        for i, kept in enumerate(self.summary.parts[part].kept):
            count = 1 if not kept.per_token else min(tokens, kept.sees or tokens)
            size = kept.bytes if self.cache_dtype is None else kept.float8
            total += count * self._number(("cache", part, i), size, values)
        return total

    def _peak(self, part: int, plan: Plan, rows: int, length: int) -> float:
        """The most bytes of results that are alive at the same time."""
        is_fused = self.fuses and rows * length >= LEAST_ROWS
        live = self.summary.parts[part].live_fused if is_fused else self.summary.parts[part].live
        if not live:
            return 0.0
        key = ("peak", part, plan.tp, plan.ep, plan.etp, plan.sp, rows, length)
        if key in self._costs:
            return float(self._costs[key])
        values = self._values(plan, rows, length, 0)
        sizes = self._function(("live", part, is_fused), [each.bytes for each in live])(*self._given(values))
        change: dict[int, float] = {}
        for each, size in zip(live, sizes, strict=True):
            change[each.first] = change.get(each.first, 0.0) + size
            change[each.last + 1] = change.get(each.last + 1, 0.0) - size
        most = now = 0.0
        for place in sorted(change):
            now += change[place]
            most = max(most, now)
        self._costs[key] = most
        return most

    def _held_keys(self, part: int, plan: Plan, values: Mapping[Any, float]) -> float:
        """The most bytes of keys and values, of other ranks too, that an attention has."""
        nodes = [node for node in self.summary.parts[part].nodes["prefill"] if node.kind == "attention"]
        key = ("keys", part)
        wanted = [size for node in nodes for size in node.product] if key not in self._functions else []
        numbers = iter(self._function(key, wanted)(*self._given(values)))
        each = [Attending.of([next(numbers) for _ in node.product], ITEM[node.dtype]) for node in nodes]
        return max((attending.held(plan) for attending in each), default=0.0)
