"""What a plan costs on a cluster: memory of the fullest rank, seconds of a prompt and of a token, and what binds.

    prefill    in runs of at most `RUN_TOKENS` tokens; with stages, runs follow each other through them
    decode     with stages, as many groups of rows take turns: a token waits for all stages, or for the slowest one of
               its turn
    memory     weights, cache for prompt and new tokens, results alive at the same time in a run, what is exchanged
    tokens over sp    of a prompt, each rank's share of all work (`sequences`); of a single token, attention alone

Kernels take what `kernel_times` says, at the speed of this product's steps where that was measured (`OwnSteps`),
collectives what the links of their group take (`collectives`). Nothing overlaps. The rank that holds most, and the
slowest device, speak for all.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy

from partitioner.analysis.cost.expressions import EXPERTS, MET
from partitioner.planning.cluster import Cluster, bad_order, hops
from partitioner.planning.collectives import Hop, collective_seconds
from partitioner.planning.kernels import Kernels, kernels_of
from partitioner.planning.pricing.held_bytes import HeldBytes
from partitioner.planning.pricing.kernel_times import KernelTimes
from partitioner.planning.pricing.own_steps import OwnSteps, StepShares, met_of_fullest, own_steps
from partitioner.planning.pricing.sequences import Attending, shares_out
from partitioner.planning.pricing.stage_split import asked_head, slowest_of, split_layers
from partitioner.planning.pricing.stored_format import ITEM, StoredFormat
from partitioner.planning.quantities import Memory, Price, Seconds, Workload, runs_of
from partitioner.planning.summary import Summary
from partitioner.program.plan import Plan

__all__ = ["Pricer"]

STEP_S = 50e-6
"""Host work of a step that is launched as one graph: inputs, the choice of tokens."""
HEAD_WORTH = 0.01
"""By how much a token must be faster before stages share the vocabulary head out, as the pass `pipeline` asks."""
CHOICE_BYTES = 8
"""What a stage says of a row's best token: its number and its logit."""


class Pricer(HeldBytes):
    """Prices plans for one model on one cluster; what plans have in common is computed once."""

    def __init__(
        self, summary: Summary, cluster: Cluster, *, overhead_s: float = STEP_S, stored: StoredFormat | None = None,
        cache_dtype: str | None = None, own: bool | OwnSteps = True,
        kernels: Callable[[Kernels], Kernels] | None = None,
    ) -> None:  # fmt: skip
        """stored: how the layers' matrices are kept, None: as the model has them. cache_dtype: as in `CacheSize`. own:
        price steps of this product, as they were measured or as given, not of an engine that reaches what the kernels'
        tables say. kernels: makes those of an engine out of the device's.
        """
        kind = cluster.weakest
        super().__init__(summary, kind, stored, cache_dtype)
        self.cluster, self.overhead_s = cluster, overhead_s
        options: Any = {
            "overhead_s": overhead_s,
            "stored": stored,
            "cache_dtype": cache_dtype,
            "own": own,
            "kernels": kernels,
        }
        self._own = own if isinstance(own, OwnSteps) else own_steps(kind.fitted) if own else None
        self._of_expanded = None if summary.expanded is None else Pricer(summary.expanded, cluster, **options)
        known = kernels_of(kind.name, kind.bytes_per_s, kind.flops_per_s, fitted=kind.fitted)
        self.kernels = known if kernels is None else kernels(known)
        self._with_experts = {
            number
            for number, part in enumerate(summary.parts)
            if any(node.kind == "experts" for node in part.nodes["decode"])
        }

    def _of(self, plan: Plan) -> Pricer:
        """Others, for a plan that caches keys and values where something narrower could be."""
        keeps_all = plan.sp > 1 or plan.cache == "expanded"
        return self._of_expanded if keeps_all and self._of_expanded is not None else self

    def keeps_latents(self, plan: Plan) -> bool:
        """Whether what is remembered of a token is narrower than its keys and values."""
        return self._of_expanded is not None and self._of(plan) is self

    def at_steps(self, own: OwnSteps) -> Pricer:
        """The same, by other steps of this product."""
        found = copy.copy(self)
        found._own, found._costs = own, {}
        found._of_expanded = None if self._of_expanded is None else self._of_expanded.at_steps(own)
        return found

    def cache_bytes(self, plan: Plan) -> float:
        """Of one token, on the rank that keeps the most of it."""
        if (other := self._of(plan)) is not self:
            return other.cache_bytes(plan)
        workload, layers = Workload(plan.sp, 1), self.even_stages(plan)
        one, two = (self.memory(plan, replace(workload, prompt=n * plan.sp), layers).cache for n in (1, 2))
        return two - one

    def price(self, plan: Plan, workload: Workload) -> Price:
        if (other := self._of(plan)) is not self:
            return other.price(plan, workload)
        summary = self.summary
        mesh = plan.mesh
        local = -(-workload.batch // mesh.size("dp"))
        if mesh.world_size > self.cluster.size:
            return self._refused(plan, f"{mesh.world_size} ranks on {self.cluster.size} devices")
        if plan.sp > workload.prompt:
            return self._refused(plan, f"a prompt of {workload.prompt} tokens is no work for sp={plan.sp}")
        if plan.sp > 1 and not all(map(shares_out, summary.parts)):
            return self._refused(plan, "its tokens meet in more than attention over a cache: sp cannot share them out")
        if plan.pp > summary.num_layers:
            return self._refused(plan, f"{summary.num_layers} layers make no {plan.pp} stages")
        if plan.ep > (summary.experts.count if summary.experts is not None else 1):
            return self._refused(plan, f"no {plan.ep} experts to share out")
        layers, shares_head = self.even_stages(plan), False
        if self.memory(plan, workload, layers).weights <= self.usable:  # else no cut makes it fit
            layers, shares_head = self._stages(plan, workload, local)
        memory = self.memory(plan, workload, layers, shares_head=shares_head)
        if not memory.fits:
            over = (memory.total - memory.usable) / 1e9
            return Price(plan, memory, f"{over:.1f} GB too much for a rank of {memory.usable / 1e9:.1f} GB usable",
                         layers=layers, shares_head=shares_head)  # fmt: skip
        prefill, how_prefill = self._prefill(plan, workload, local, layers, shares_head=shares_head)
        decode, how_decode = self._decode(plan, workload, local, layers, shares_head=shares_head)
        how = how_prefill if how_prefill == how_decode else f"{how_prefill}, then {how_decode}"
        note = bad_order(self.cluster, mesh)
        return Price(plan, memory, "", prefill, decode, workload, how, layers, note, shares_head)

    def _refused(self, plan: Plan, why: str) -> Price:
        return Price(plan, Memory(0, 0, 0, 0, self.usable), why)

    def memory(self, plan: Plan, workload: Workload, layers: Sequence[int], *, shares_head: bool = False) -> Memory:
        if (other := self._of(plan)) is not self:
            return other.memory(plan, workload, layers, shares_head=shares_head)
        return super().memory(plan, workload, layers, shares_head=shares_head)

    # seconds

    def part_seconds(
        self, part: int, entry: str, plan: Plan, rows: int, length: int, past: int, *, over_stages: bool = False
    ) -> Seconds:
        """Of one part on the fullest rank, with collectives over tp. over_stages: with a stage's rows of the head."""
        links = self._hops(plan, ("tp",)), self._hops(plan, ("sp",)) if plan.sp > 1 else ()
        stages = plan.pp if over_stages else 1
        key = (part, entry, plan.tp, plan.ep, plan.etp, plan.sp, plan.sp_attention, links, rows, length, past, stages)
        found: Seconds | None = self._costs.get(key)
        if found is None:
            found = self._costs[key] = self._part_seconds(part, entry, plan, rows, length, past, over_stages)
        return found

    def _part_seconds(
        self, part: int, entry: str, plan: Plan, rows: int, length: int, past: int, over_stages: bool
    ) -> Seconds:
        nodes = self.summary.parts[part].nodes[entry]
        dealt, steps = plan.sp if entry == "prefill" else 1, entry == "decode"
        values = self._values(plan, rows, -(-length // dealt), past, alike=steps)
        if self._of_step(entry, rows) is not None:
            values[MET] = met_of_fullest(values[MET], values[EXPERTS], plan.ep)
        if over_stages:
            values = self._over_stages(plan, values)
        wanted: list[Any] = []
        for node in nodes if (part, entry) not in self._functions else ():
            wanted += [node.flops, node.read + node.written, *node.product, *(m.bytes for m in node.meetings)]
        numbers = iter(self._function((part, entry), wanted)(*self._given(values)))
        # of attention, the tokens of all ranks: a rank's queries see all of them
        whole = numbers
        if plan.sp > 1:
            every = self._values(plan, rows, length, past, alike=steps)
            whole = iter(self._function((part, entry), [])(*self._given(every)))
        inside = part not in (self.summary.first, self.summary.last)
        times = KernelTimes(self.kernels, self._hops(plan, ("tp",)), self.stored if inside else None, values[EXPERTS],
                            values[MET], self.cache_item, self._of_step(entry, rows),
                            1.0 if self._own is None else self._own.reduces)  # fmt: skip
        for node in nodes:
            flops, moved = next(numbers), next(numbers)
            product = [next(numbers) for _ in node.product]
            if plan.sp > 1:
                of_all = [next(whole) for _ in range(2 + len(node.product) + len(node.meetings))]
                if node.kind == "attention":
                    attending = Attending.of(of_all[2:], ITEM[node.dtype])
                    flops, moved = attending.meet(times.seconds, plan, self._hops(plan, ("sp",)), of_all, steps=steps)
                    product = attending.on_a_rank(plan, steps=steps)
            if node.kind in ("move", "other") and not node.meetings:
                times.other(node, moved)
                continue
            times.end_run()
            for meeting in node.meetings:
                times.collective(meeting.kind, next(numbers) * (plan.tp if meeting.kind == "all_gather" else 1))
            if node.kind != "meeting":
                times.product(node, product, flops, moved)
        return times.end().at_speed(1.0 if self._own is None or steps else self._own.prefill)

    def _of_step(self, entry: str, rows: int) -> StepShares | None:
        if self._own is None or self.stored is not None:
            return None
        return self._own.of_step(entry, rows, self.summary.dtype)

    def _hops(self, plan: Plan, axes: tuple[str, ...]) -> tuple[Hop, ...]:
        key = ("hops", plan.mesh, axes)
        if key not in self._costs:
            self._costs[key] = hops(self.cluster, plan.mesh.group(axes, 0))
        found: tuple[Hop, ...] = self._costs[key]
        return found

    def _next_stage(self, plan: Plan) -> tuple[Hop, ...]:
        """From a stage to the one that follows it."""
        key = ("next stage", plan.mesh)
        if key not in self._costs:
            self._costs[key] = hops(self.cluster, plan.mesh.group(("pp",), 0)[:2])
        found: tuple[Hop, ...] = self._costs[key]
        return found

    def _exchange(self, plan: Plan, tokens: float, *, alike: bool = False) -> tuple[float, str]:
        """Of one layer: how tokens come to their experts and back, by the cheaper of two ways; over tp, by none.

        alike: whether the ranks of sp have the same tokens, as in steps; they sum what their experts make of them.
        """
        experts = self.summary.experts
        etp = max(plan.etp, 1)
        if experts is None or plan.ep == 1:
            return 0.0, ""
        groups = plan.ep * etp // (plan.tp * plan.sp if alike else plan.tp)
        if groups <= 1:
            over_sp = plan.ep * etp > plan.tp and alike and plan.sp > 1
            links = self._hops(plan, ("sp",)) if over_sp else ()
            return collective_seconds("all_reduce", links, tokens * experts.row_bytes), "replicate"
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
        self, plan: Plan, entry: str, rows: int, length: int, past: int, layers: Sequence[int], *, head: bool = True
    ) -> tuple[list[Seconds], str]:
        """head: whether the last stage computes the vocabulary head."""
        summary = self.summary
        own = rows * (-(-length // plan.sp) if entry == "prefill" else length)
        exchange, how = self._exchange(plan, own, alike=entry == "decode")
        found, start = [], 0
        for stage, count in enumerate(layers):
            mine = Seconds()
            for part, times in Counter(summary.order[start : start + count]).items():
                mine.add(self.part_seconds(part, entry, plan, rows, length, past), times)
                if exchange and part in self._with_experts:
                    mine.link(how, exchange * times)
            start += count
            if stage == 0:
                mine.add(self.part_seconds(summary.first, entry, plan, rows, length, past))
            if head and stage == len(layers) - 1:
                mine.add(self.part_seconds(summary.last, entry, plan, rows, length, past))
            mine.waiting += self._beside(entry, mine, plan, rows, start - count, count)
            if stage < len(layers) - 1:
                mine.link("send", collective_seconds("send", self._next_stage(plan), own * summary.hidden_bytes))
            found.append(mine)
        return found, how

    def _beside(self, entry: str, mine: Seconds, plan: Plan, rows: int, start: int, count: int) -> float:
        """What a stage's run takes beside its kernels. count: its layers, from `start` on."""
        own = self._own
        if own is None or self.summary.dtype not in own.DTYPES:
            return self.overhead_s
        if (step := self._of_step(entry, rows)) is not None:
            return step.step_s / plan.pp
        if entry == "decode":
            return self.overhead_s
        # pieces that come again are captured on one stage, where sequences are whole and all ranks have the same
        is_captured = plan.pp == plan.sp == 1 and plan.mesh.size("dp") == plan.replicas
        launched = 0 if is_captured else self.summary.ops_of(self.summary.order[start : start + count])
        return max(0.0, own.op_s * launched - mine.total)

    def step_seconds(self, plan: Plan, rows: int, past: int, layers: Sequence[int]) -> float:
        """Between two tokens of the rows of one replica, whose caches hold `past` tokens each."""
        return self._of(plan)._decode(plan, Workload(past, 1), rows, layers)[0].total

    def run_seconds(self, plan: Plan, rows: int, length: int, past: int, layers: Sequence[int]) -> tuple[float, float]:
        """Of a run of `rows` prompts' next `length` tokens, behind `past` ones each; and of its slowest stage."""
        stages, _ = self._of(plan)._stage_seconds(plan, "prefill", rows, length, past, layers)
        return sum(stage.total for stage in stages), max(stage.total for stage in stages)

    def prompt_flops(self, plan: Plan, prompt: int) -> float:
        """Products of one prompt on the fullest rank, all stages together."""
        values, total = self._values(plan, 1, prompt, 0), 0.0
        for part in (self.summary.first, *self.summary.order, self.summary.last):
            nodes, key = self.summary.parts[part].nodes["prefill"], ("flops", part)
            wanted = [sum((node.flops for node in nodes), sympy.Integer(0))] if key not in self._functions else []
            total += self._number(key, wanted[0] if wanted else None, values)
        return total

    def even_stages(self, plan: Plan) -> tuple[int, ...]:
        """Layers of each stage, the first ones one more where they do not divide."""
        small, larger = divmod(self.summary.num_layers, plan.pp)
        return tuple(small + (stage < larger) for stage in range(plan.pp))

    def _products_of(self, part: int, plan: Plan, seconds: float) -> list[float]:
        """The seconds of a part, as its products share them out by what they read."""
        nodes = [node for node in self.summary.parts[part].nodes["decode"] if node.kind in ("linear", "experts")]
        key = "products of", part
        wanted = [] if key in self._functions else [node.read for node in nodes]
        moved = self._function(key, wanted)(*self._given(self._values(plan, 1, 1, 0, alike=True)))
        return [seconds * float(each) / sum(moved) for each in moved] or [seconds]

    def _shared_head(self, plan: Plan, entry: str, rows: int, length: int, past: int) -> Seconds:
        """Of the vocabulary head whose rows all stages share out: what it reads goes to all, and their choices back."""
        found = Seconds()
        found.add(self.part_seconds(self.summary.last, entry, plan, rows, length, past, over_stages=True))
        links = self._hops(plan, ("pp",))
        for size in (rows * self.summary.hidden_bytes, rows * CHOICE_BYTES * plan.pp):
            found.link("all_gather", collective_seconds("all_gather", links, size))
        return found

    def _prefill(
        self, plan: Plan, workload: Workload, rows: int, layers: Sequence[int], *, shares_head: bool = False
    ) -> tuple[Seconds, str]:
        """Until all rows have their first token."""
        run_rows, length, runs = runs_of(workload, rows)
        past = (workload.prompt - length) // 2
        stages, how = self._stage_seconds(plan, "prefill", run_rows, length, past, layers, head=not shares_head)
        slowest = max(stages, key=lambda each: each.total)
        found = Seconds()
        for stage in stages:
            found.add(stage)
        found.add(slowest, runs - 1)
        if shares_head:
            found.add(self._shared_head(plan, "prefill", run_rows, length, past), runs)
        if self._own is not None and self.summary.dtype in self._own.DTYPES:
            found.waiting += self._own.first_s
        return found, how

    def _decode(
        self, plan: Plan, workload: Workload, rows: int, layers: Sequence[int], *, shares_head: bool = False
    ) -> tuple[Seconds, str]:
        """Between two tokens of a row."""
        groups = min(plan.pp, rows)
        of_group, past = -(-rows // groups), workload.prompt + workload.new // 2
        stages, how = self._stage_seconds(plan, "decode", of_group, 1, past, layers, head=not shares_head)
        head = self._shared_head(plan, "decode", of_group, 1, past) if shares_head else Seconds()
        found = Seconds()
        for stage in (*stages, head):
            found.add(stage)
        turn = groups * (max(stage.total for stage in stages) + head.total)
        if plan.pp > 1 and self._own is not None and self._of_step("decode", of_group) is not None:
            # what is queued ahead hides a message, and a host that is quicker than the stages
            found.waiting += self._own.message_s * plan.pp
            turn = max(turn, groups * self._own.turn_s)
        found.waiting += max(0.0, turn - found.total)
        return found, how

    def _stages(self, plan: Plan, workload: Workload, rows: int) -> tuple[tuple[int, ...], bool]:
        """How many layers each stage has, the slowest as fast as can be in decode; whether they share the head out: as
        the plan asks, or where a token takes 1% less by it.
        """
        if plan.pp == 1:
            return (self.summary.num_layers,), False
        past = workload.prompt + workload.new // 2
        group = -(-rows // min(plan.pp, rows))
        parts = range(len(self.summary.parts))
        times = [self.part_seconds(part, "decode", plan, group, 1, past).total for part in parts]
        costs = [times[part] for part in self.summary.order]
        costs[0] += times[self.summary.first]
        shared = split_layers(costs, plan.pp)
        costs[-1] += times[self.summary.last]
        alone = split_layers(costs, plan.pp)
        asked = asked_head(plan)
        if asked is None:  # stages are cut between products, and so as even as those are small
            products = [share for part in self.summary.order for share in self._products_of(part, plan, times[part])]
            head = self._products_of(self.summary.last, plan, times[self.summary.last])
            meetings = self._shared_head(plan, "decode", group, 1, past).total
            now = slowest_of([times[self.summary.first], *products, *head], plan.pp)
            asked = now / (slowest_of([times[self.summary.first], *products], plan.pp) + meetings) - 1 >= HEAD_WORTH
        return (shared if asked else alone), asked
