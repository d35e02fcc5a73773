"""What a plan costs on a cluster: memory of the fullest rank, seconds of a prompt and of a token, and what binds.

    prefill    in runs of at most `RUN_TOKENS` tokens; with stages, runs follow each other through them
    decode     with stages, as many groups of rows take turns: a token waits for all stages, or for the slowest one of
               its turn
    memory     weights, cache for prompt and new tokens, results alive at the same time in a run, what is exchanged

A product takes what kernels of its size take (`kernels`), element-wise ops between two products one pass over the
largest of their operands (compiled steps fuse them), a collective what the links of its group take (`collectives`).
Nothing overlaps. The rank that holds most, and the slowest device, speak for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy

from partitioner.analysis.cost.expressions import EXPERTS, MET, ROUTED, NodeExpression
from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster, bad_order, hops
from partitioner.planning.collectives import Hop, collective_seconds
from partitioner.planning.kernels import Kernels, kernels_of
from partitioner.planning.stage_split import split_layers
from partitioner.planning.summary import Summary
from partitioner.program.plan import Plan
from partitioner.sharding.mesh import Mesh

__all__ = ["RUN_TOKENS", "Memory", "Price", "Pricer", "Seconds", "Workload"]

RUN_TOKENS = 8192
LAUNCH_S = 2e-6
"""From the end of a kernel to the start of the next one in a captured step."""
STEP_S = 50e-6
"""Host work of a step that is launched as one graph: inputs, the choice of tokens."""


_ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Workload:
    """batch: requests at the same time, over the whole cluster. ttft_s, tpot_s: the most that is allowed."""

    prompt: int
    new: int
    batch: int = 1
    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        if min(self.prompt, self.new, self.batch) < 1:
            raise InputError(f"prompt, new and batch are at least 1; got {self.prompt}, {self.new}, {self.batch}")
        if any(limit is not None and not limit > 0 for limit in (self.ttft_s, self.tpot_s)):
            raise InputError("limits of ttft and tpot are seconds above 0")


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank."""

    weights: float
    cache: float
    activations: float
    buffers: float
    usable: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.activations + self.buffers

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


@dataclass
class Seconds:
    """By what they are spent on."""

    memory: float = 0.0
    products: float = 0.0
    links: float = 0.0
    waiting: float = 0.0
    """For other stages, for launches and the host."""
    by_collective: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.memory + self.products + self.links + self.waiting

    @property
    def binds(self) -> str:
        names = {"memory": "memory bandwidth", "products": "products", "links": "links", "waiting": "waiting"}
        return names[max(names, key=lambda name: getattr(self, name))]

    def add(self, other: Seconds, times: float = 1.0) -> None:
        for name in ("memory", "products", "links", "waiting"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name, value in other.by_collective.items():
            self.by_collective[name] = self.by_collective.get(name, 0.0) + times * value

    def link(self, name: str, seconds: float) -> None:
        self.links += seconds
        self.by_collective[name] = self.by_collective.get(name, 0.0) + seconds


@dataclass(frozen=True)
class Price:
    """Of one plan. refused: why it cannot be, or ""; times are None then. exchange: of experts, by entry."""

    plan: Plan
    memory: Memory
    refused: str = ""
    prefill: Seconds | None = None
    decode: Seconds | None = None
    workload: Workload | None = None
    exchange: str = ""
    layers: tuple[int, ...] = ()
    note: str = ""

    @property
    def ttft_s(self) -> float:
        return self.prefill.total if self.prefill is not None else math.inf

    @property
    def tpot_s(self) -> float:
        return self.decode.total if self.decode is not None else math.inf

    @property
    def latency_s(self) -> float:
        """Until a request's last token."""
        return self.ttft_s + (self.workload.new - 1) * self.tpot_s if self.workload is not None else math.inf

    @property
    def tokens_per_s(self) -> float:
        """New tokens, of all requests."""
        return self.workload.batch * self.workload.new / self.latency_s if self.workload is not None else 0.0


class Pricer:
    """Prices plans for one model on one cluster; what plans have in common is computed once."""

    def __init__(
        self, summary: Summary, cluster: Cluster, *, overhead_s: float = STEP_S, weight_dtype: str = ""
    ) -> None:
        """weight_dtype: "float8_e4m3fn" where the layers' matrices are stored, and multiplied, in one byte each."""
        self.summary, self.cluster, self.overhead_s = summary, cluster, overhead_s
        if weight_dtype not in ("", "float8_e4m3fn"):
            raise InputError(f"weights are priced in the model's own dtype or in float8_e4m3fn; got {weight_dtype!r}")
        self.weight_dtype = weight_dtype
        self._saved = _ITEM[summary.dtype] - 1 if weight_dtype else 0
        kind = cluster.weakest
        self.usable = kind.usable_bytes
        self.kernels: Kernels = kernels_of(kind.name, kind.bytes_per_s, kind.flops_per_s, fitted=kind.fitted)
        self._functions: dict[tuple[int, str], Callable[..., Any]] = {}
        self._costs: dict[Any, Any] = {}

    def price(self, plan: Plan, workload: Workload) -> Price:
        summary = self.summary
        mesh = plan.mesh
        local = -(-workload.batch // mesh.size("dp"))
        if mesh.world_size > self.cluster.size:
            return self._refused(plan, f"{mesh.world_size} ranks on {self.cluster.size} devices")
        if plan.sp > 1:
            return self._refused(plan, "sp is not priced: no pass divides a model over it yet")
        if plan.pp > summary.num_layers:
            return self._refused(plan, f"{summary.num_layers} layers make no {plan.pp} stages")
        if plan.ep > (summary.experts.count if summary.experts is not None else 1):
            return self._refused(plan, f"no {plan.ep} experts to share out")
        layers = self._stages(plan, workload, local)
        memory = self.memory(plan, workload, layers)
        if not memory.fits:
            over = (memory.total - memory.usable) / 1e9
            return Price(plan, memory, f"{over:.1f} GB too much for a rank of {memory.usable / 1e9:.1f} GB usable",
                         layers=layers)  # fmt: skip
        prefill, how_prefill = self._prefill(plan, workload, local, layers)
        decode, how_decode = self._decode(plan, workload, local, layers)
        how = how_prefill if how_prefill == how_decode else f"{how_prefill}, then {how_decode}"
        return Price(plan, memory, "", prefill, decode, workload, how, layers, bad_order(self.cluster, mesh))

    def _refused(self, plan: Plan, why: str) -> Price:
        return Price(plan, Memory(0, 0, 0, 0, self.usable), why)

    # memory

    def memory(self, plan: Plan, workload: Workload, layers: Sequence[int]) -> Memory:
        summary = self.summary
        values = self._values(plan, 1, 1, 0)
        numbers = [self._weights(part, values) for part in range(len(summary.parts))]
        rows = -(-workload.batch // plan.mesh.size("dp"))
        tokens = workload.prompt + workload.new
        caches = [self._cache(part, values, tokens) for part in range(len(summary.parts))]
        stages, start = [], 0
        for stage, count in enumerate(layers):
            mine = summary.order[start : start + count]
            start += count
            mine += [summary.first] * (stage == 0) + [summary.last] * (stage == len(layers) - 1)
            stages.append((sum(numbers[part] for part in mine), rows * sum(caches[part] for part in mine)))
        weights, cache = max(stages, key=sum)
        run_rows, length, _ = _runs(workload, rows)
        activations = max(self._peak(part, plan, run_rows, length) for part in set(summary.order) | {summary.last})
        in_flight = 2 if plan.pp > 1 else 1
        buffers = 2 * in_flight * run_rows * length * summary.hidden_bytes
        return Memory(weights, cache, activations, buffers, self.usable)

    def _weights(self, part: int, values: Mapping[Any, float]) -> float:
        found = self._number(("weights", part), self.summary.parts[part].weight_bytes, values)
        inside = part not in (self.summary.first, self.summary.last)
        return found / _ITEM[self.summary.dtype] if self.weight_dtype and inside else found

    def _cache(self, part: int, values: Mapping[Any, float], tokens: int) -> float:
        total = 0.0
        for i, kept in enumerate(self.summary.parts[part].kept):
            count = 1 if not kept.per_token else min(tokens, kept.sees or tokens)
            total += count * self._number(("cache", part, i), kept.bytes, values)
        return total

    def _peak(self, part: int, plan: Plan, rows: int, length: int) -> float:
        """The most bytes of results that are alive at the same time."""
        live = self.summary.parts[part].live
        if not live:
            return 0.0
        values = self._values(plan, rows, length, 0)
        sizes = self._function(("live", part), [each.bytes for each in live])(*self._given(values))
        change: dict[int, float] = {}
        for each, size in zip(live, sizes, strict=True):
            change[each.first] = change.get(each.first, 0.0) + size
            change[each.last + 1] = change.get(each.last + 1, 0.0) - size
        most = now = 0.0
        for place in sorted(change):
            now += change[place]
            most = max(most, now)
        return most

    # sizes

    def _values(self, plan: Plan, rows: float, length: float, past: float) -> dict[Any, float]:
        summary = self.summary
        etp = plan.etp if plan.ep * plan.etp > 1 else plan.tp
        found = summary.values(tp=plan.tp, ep=plan.ep, etp=etp)
        experts = summary.experts
        found |= {summary.batch: rows, summary.sequence: length}
        found[next(s for s in summary.arguments if str(s) == "past")] = past
        found[MET], found[ROUTED] = 1, 1
        if experts is not None:
            groups = max(1, plan.ep * etp // plan.tp)  # replicas whose tokens meet at the experts
            tokens = rows * length * groups
            chance = 1 - (1 - experts.chosen / experts.count) ** tokens
            found[MET] = max(min(found[EXPERTS], found[EXPERTS] * chance), min(found[EXPERTS], 1e-9))
            found[ROUTED] = groups / plan.ep
        return found

    def _given(self, values: Mapping[Any, float]) -> list[float]:
        return [values[symbol] for symbol in self.summary.arguments]

    def _number(self, key: Any, expression: Any, values: Mapping[Any, float]) -> float:
        return float(self._function(key, [expression])(*self._given(values))[0])

    def _function(self, key: Any, wanted: list[Any]) -> Callable[..., Any]:
        if key not in self._functions:
            modules: list[Any] = [{"Min": min, "Max": max, "floor": math.floor}, "math"]
            self._functions[key] = sympy.lambdify(self.summary.arguments, wanted, modules=modules, cse=True)
        return self._functions[key]

    # seconds

    def part_seconds(self, part: int, entry: str, plan: Plan, rows: int, length: int, past: int) -> Seconds:
        """Of one part on the fullest rank, with its collectives over tp."""
        key = (part, entry, plan.tp, plan.ep, plan.etp, plan.pp, plan.dp if plan.ep > 1 else 0, rows, length, past)
        if key not in self._costs:
            self._costs[key] = self._part_seconds(part, entry, plan, rows, length, past)
        found: Seconds = self._costs[key]
        return found

    def _part_seconds(self, part: int, entry: str, plan: Plan, rows: int, length: int, past: int) -> Seconds:
        nodes = self.summary.parts[part].nodes[entry]
        values = self._values(plan, rows, length, past)
        wanted: list[Any] = []
        for node in nodes:
            wanted += [node.flops, node.read + node.written, *node.product, *(m.bytes for m in node.meetings)]
        numbers = iter(self._function((part, entry), wanted)(*self._given(values)))
        links = self._hops(plan, ("tp",))
        found = Seconds()
        run: list[float] = []
        for node in nodes:
            flops, moved = next(numbers), next(numbers)
            product = [next(numbers) for _ in node.product]
            if node.kind in ("move", "other") and not node.meetings:
                run += [moved] if moved else []
                continue
            self._end_run(found, run)
            for meeting in node.meetings:
                size = next(numbers) * (plan.tp if meeting.kind == "all_gather" else 1)
                found.link(meeting.kind, collective_seconds(meeting.kind, links, size))
            if node.kind != "meeting":
                inside = part not in (self.summary.first, self.summary.last)
                self._product(found, node, product, flops, moved, values, small=bool(self.weight_dtype) and inside)
        self._end_run(found, run)
        return found

    def _end_run(self, found: Seconds, run: list[float]) -> None:
        """Element-wise ops in a row, fused: one pass over the largest."""
        if run:
            found.memory += self.kernels.other(max(run))
            found.waiting += LAUNCH_S
            run.clear()

    def _product(
        self, found: Seconds, node: NodeExpression, product: Sequence[float], flops: float, moved: float,
        values: Mapping[Any, float], *, small: bool,
    ) -> None:  # fmt: skip
        """small: its weights are stored in one byte each."""
        kernels, dtype = self.kernels, node.dtype
        if small and node.kind in ("linear", "experts") and dtype == self.summary.dtype:
            count = product[1] * product[2] * (values[MET] if node.kind == "experts" else 1)
            moved, dtype = moved - self._saved * count, self.weight_dtype
        if node.kind == "linear":
            seconds = kernels.linear(*product, moved, dtype)
        elif node.kind == "attention":
            rows, heads, kv_heads, _, queries, keys, _ = product
            seconds = kernels.attention(rows=rows, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys,
                                        flops=flops, num_bytes=moved, dtype=node.dtype)  # fmt: skip
        else:
            seconds = kernels.experts(rows=product[0], experts=values[EXPERTS], flops=flops, num_bytes=moved,
                                      dtype=dtype)  # fmt: skip
        found.waiting += LAUNCH_S
        if flops / kernels.rate(dtype) > moved / kernels.bytes_per_s:
            found.products += seconds
        else:
            found.memory += seconds

    def _hops(self, plan: Plan, axes: tuple[str, ...]) -> tuple[Hop, ...]:
        key = ("hops", plan.mesh, axes)
        if key not in self._costs:
            self._costs[key] = hops(self.cluster, plan.mesh.group(axes, 0))
        found: tuple[Hop, ...] = self._costs[key]
        return found

    def _exchange(self, plan: Plan, tokens: float) -> tuple[float, str]:
        """Of one layer: how tokens come to their experts and back, by the cheaper of two ways; over tp alone, by none."""
        experts = self.summary.experts
        etp = max(plan.etp, 1)
        groups = plan.ep * etp // plan.tp
        if experts is None or plan.ep == 1:
            return 0.0, ""
        if groups <= 1:
            return 0.0, "replicate"
        links = self._hops(plan, ("ep",))
        own = tokens / plan.tp if etp == 1 else tokens
        met = plan.ep * (1 - (1 - 1 / plan.ep) ** experts.chosen)
        there = 2 * collective_seconds("all_to_all", links, own * met * experts.row_bytes)
        together = own * plan.ep * experts.row_bytes
        gather = collective_seconds("all_gather", links, together)
        gather += collective_seconds("reduce_scatter", links, together)
        again = 0.0
        if etp == 1 and plan.tp > 1:  # rows were shared out over tp, and are made whole again
            again = collective_seconds("all_gather", self._hops(plan, ("tp",)), tokens * experts.row_bytes)
        best, how = min((there, "exchange"), (gather, "gather"))
        return best + again, how

    def _stage_seconds(
        self, plan: Plan, entry: str, rows: int, length: int, past: int, layers: Sequence[int]
    ) -> tuple[list[Seconds], str]:
        summary = self.summary
        exchange, how = self._exchange(plan, rows * length)
        found, start = [], 0
        for stage, count in enumerate(layers):
            mine = Seconds()
            for part in summary.order[start : start + count]:
                mine.add(self.part_seconds(part, entry, plan, rows, length, past))
                if exchange and any(node.kind == "experts" for node in summary.parts[part].nodes[entry]):
                    mine.link(how, exchange)
            start += count
            if stage == 0:
                mine.add(self.part_seconds(summary.first, entry, plan, rows, length, past))
            if stage == len(layers) - 1:
                mine.add(self.part_seconds(summary.last, entry, plan, rows, length, past))
            mine.waiting += self.overhead_s
            if stage < len(layers) - 1:
                pair = _pair(plan.mesh)
                size = rows * length * summary.hidden_bytes
                mine.link("send", collective_seconds("send", hops(self.cluster, pair), size))
            found.append(mine)
        return found, how

    def _prefill(self, plan: Plan, workload: Workload, rows: int, layers: Sequence[int]) -> tuple[Seconds, str]:
        """Until all rows have their first token."""
        run_rows, length, runs = _runs(workload, rows)
        past = (workload.prompt - length) // 2
        stages, how = self._stage_seconds(plan, "prefill", run_rows, length, past, layers)
        slowest = max(stages, key=lambda each: each.total)
        found = Seconds()
        for stage in stages:
            found.add(stage)
        found.add(slowest, runs - 1)
        return found, how

    def _decode(self, plan: Plan, workload: Workload, rows: int, layers: Sequence[int]) -> tuple[Seconds, str]:
        """Between two tokens of a row."""
        groups = min(plan.pp, rows)
        stages, how = self._stage_seconds(
            plan, "decode", -(-rows // groups), 1, workload.prompt + workload.new // 2, layers
        )
        found = Seconds()
        for stage in stages:
            found.add(stage)
        turn = groups * max(stage.total for stage in stages)
        found.waiting += max(0.0, turn - found.total)
        return found, how

    def _stages(self, plan: Plan, workload: Workload, rows: int) -> tuple[int, ...]:
        """How many layers each stage has, the slowest as fast as can be in decode."""
        if plan.pp == 1:
            return (self.summary.num_layers,)
        past = workload.prompt + workload.new // 2
        group = -(-rows // min(plan.pp, rows))
        times = [self.part_seconds(p, "decode", plan, group, 1, past).total for p in range(len(self.summary.parts))]
        costs = [times[part] for part in self.summary.order]
        costs[0] += times[self.summary.first]
        costs[-1] += times[self.summary.last]
        return split_layers(costs, plan.pp)


def _runs(workload: Workload, rows: int) -> tuple[int, int, int]:
    """Rows of a run, its tokens of each, and how many runs."""
    if workload.prompt >= RUN_TOKENS:
        return 1, RUN_TOKENS, rows * -(-workload.prompt // RUN_TOKENS)
    together = min(rows, RUN_TOKENS // workload.prompt)
    return together, workload.prompt, -(-rows // together)


def _pair(mesh: Mesh) -> tuple[int, int]:
    first, second = mesh.group(("pp",), 0)[:2]
    return first, second
