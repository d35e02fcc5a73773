"""Every plan that a cluster has room for, priced, and ranked by what is asked for; nothing is compiled.

    latency       the shortest time to a request's last token
    throughput    the most new tokens per second, of all requests together
    context       the longest prompts that fit, and of those the shortest time

What does not fit is refused with the bytes. Plans that break a limit (ttft, tpot) come after those that keep all.
All plans are priced: what they have in common is computed once, so that hundreds take seconds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from partitioner.errors import InputError, PlanError
from partitioner.planning.cluster import Cluster
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.pricing.stored_format import StoredFormat
from partitioner.planning.quantities import GOALS, Price, Workload
from partitioner.planning.summary import Summary, summarize
from partitioner.program.plan import Plan

SP_TOKENS = 1024
"""Of a prompt, for each rank of sp, before sharing tokens out is considered: with fewer, tp divides the same work."""

__all__ = ["SP_TOKENS", "Choice", "broken_limits", "choose_plan", "plans", "search"]


@dataclass(frozen=True)
class Choice:
    """ranked: plans that fit, the best first. refused: those that do not. frontier: by batch, the best plan's price.

    contexts: by plan, the longest prompt that fits; of the goal "context" alone.
    """

    goal: str
    ranked: tuple[Price, ...]
    refused: tuple[Price, ...]
    frontier: tuple[Price, ...] = ()
    contexts: tuple[tuple[str, int], ...] = ()

    @property
    def best(self) -> Price:
        if not self.ranked:
            least = min(self.refused, key=lambda each: each.memory.total or math.inf, default=None)
            why = f"; the closest is {least.plan}: {least.refused}" if least is not None else ""
            raise PlanError(f"no plan fits{why}")
        return self.ranked[0]


def plans(summary: Summary, cluster: Cluster, workload: Workload, *, weights: str = "expanded") -> Iterator[Plan]:
    """All that use all devices, and those that leave some idle because there is no more to divide.

    Independent replicas (dp) take whole requests each; experts may span them.
    """
    experts = summary.experts.count if summary.experts is not None else 1
    most_tp = max((kind.atoms for kind, role in summary.classes.values() if role == "heads"), default=1)
    for used in _divisors(cluster.size):
        for tp, pp, sp in itertools.product(_divisors(used), repeat=3):
            dp, left = divmod(used, tp * pp * sp)
            if left or tp > most_tp or pp > summary.num_layers or dp > workload.batch:
                continue
            if sp > 1 and workload.prompt < SP_TOKENS * sp:
                continue
            for ep, etp in _expert_degrees(experts, dp * sp, tp):
                yield Plan(dp=dp, pp=pp, sp=sp, tp=tp, ep=ep, etp=etp, weights=weights)


def _expert_degrees(experts: int, dp: int, tp: int) -> Iterator[tuple[int, int]]:
    """Experts whole on their ranks (etp 1), or their matrices split over tp and the experts over replicas."""
    yield 1, 1
    if experts > 1:
        for ep in _divisors(dp * tp):
            if 1 < ep <= experts and (ep % tp == 0 or tp % ep == 0):
                yield ep, 1
        for ep in _divisors(dp):
            if 1 < ep <= experts and tp > 1:
                yield ep, tp


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def broken_limits(price: Price) -> list[str]:
    workload = price.workload
    if workload is None:
        return []
    limits = (("ttft", price.ttft_s, workload.ttft_s), ("tpot", price.tpot_s, workload.tpot_s))
    return [f"{name} {found:.3g} s > {most:.3g} s" for name, found, most in limits if most and found > most]


def search(
    summary: Summary,
    cluster: Cluster,
    workload: Workload,
    *,
    goal: str = "latency",
    frontier: bool = True,
    stored: StoredFormat | None = None,
    cache_dtype: str | None = None,
) -> Choice:
    """All plans of `plans`, priced and ranked.

    stored: how ranks hold quantised weights as their checkpoint does. cache_dtype: as in `CacheSize`.
    """
    if goal not in GOALS:
        raise InputError(f"a plan is chosen for {', '.join(GOALS)}; got {goal!r}")
    pricer = Pricer(summary, cluster, stored=stored, cache_dtype=cache_dtype)
    # of a context it is the length that is looked for
    most = max(workload.prompt, SP_TOKENS * cluster.size) if goal == "context" else workload.prompt
    held = "expanded" if stored is None else "stored"
    candidates = list(plans(summary, cluster, replace(workload, prompt=most), weights=held))
    contexts: dict[str, int] = {}
    if goal == "context":
        contexts = {str(plan): longest_prompt(pricer, plan, workload) for plan in candidates}
        longest = max(contexts.values(), default=0)
        if longest:
            workload = replace(workload, prompt=longest)
            candidates = [plan for plan in candidates if contexts[str(plan)] >= longest]
    priced = [pricer.price(plan, workload) for plan in candidates]
    ranked = sorted((each for each in priced if not each.refused), key=lambda each: _rank(each, goal))
    refused = sorted((each for each in priced if each.refused), key=lambda each: each.memory.total)
    points = _frontier(pricer, ranked[:4], workload) if frontier and ranked else ()
    return Choice(goal, tuple(ranked), tuple(refused), points, tuple(sorted(contexts.items(), key=lambda c: -c[1])))


def _rank(price: Price, goal: str) -> tuple[Any, ...]:
    """Fewer devices and simpler plans win where times are equal."""
    wanted = -price.tokens_per_s if goal == "throughput" else price.latency_s
    return len(broken_limits(price)), round(wanted, 12), price.plan.mesh.world_size, price.plan.ep, str(price.plan)


def longest_prompt(pricer: Pricer, plan: Plan, workload: Workload) -> int:
    """The longest prompt with which the plan fits; 0 where none does."""

    def fits(prompt: int) -> bool:
        trial = replace(workload, prompt=prompt)
        layers = tuple([-(-pricer.summary.num_layers // plan.pp)] * plan.pp) if plan.pp > 1 else (0,)
        if plan.pp == 1:
            layers = (pricer.summary.num_layers,)
        return pricer.memory(plan, trial, layers).fits

    if plan.pp > pricer.summary.num_layers or not fits(1):
        return 0
    low, high = 1, 2
    while high <= 1 << 40 and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _frontier(pricer: Pricer, best: Sequence[Price], workload: Workload) -> tuple[Price, ...]:
    """Throughput against time per token: over batches, what no other point beats in both."""
    points = []
    for price in best:
        batch = price.plan.mesh.size("dp")
        while batch <= 4096:
            found = pricer.price(price.plan, replace(workload, batch=batch))
            if found.refused:
                break
            points.append(found)
            batch *= 2
    kept: list[Price] = []
    for price in sorted(points, key=lambda each: (each.tpot_s, -each.tokens_per_s)):
        if not kept or price.tokens_per_s > kept[-1].tokens_per_s * 1.001:
            kept.append(price)
    return tuple(kept)


def choose_plan(model: Any, cluster: Cluster | str, workload: Workload, *, goal: str = "latency") -> Plan:
    """The best plan for a model of transformers, a `Summary`, or what `trace` yielded."""
    where = Cluster.parse(cluster) if isinstance(cluster, str) else cluster
    summary = model if isinstance(model, Summary) else summarize(model)
    return search(summary, where, workload, goal=goal, frontier=False).best.plan
