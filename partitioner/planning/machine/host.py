"""Times of a plan on the machine at hand: by kernels and links that were measured here, and what its host adds.

pricer_here(summary, kernels, link, device)      prices plans by these
Host.of((seconds, ops), (seconds, ops))          from steps of two models whose kernels have no work
times(pricer, plan, workload, host)              seconds to the first token, and between two
"""

from __future__ import annotations

from dataclasses import dataclass

from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster, Device, Dimension
from partitioner.planning.kernels import Kernels
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary
from partitioner.program.plan import Plan

__all__ = ["Host", "pricer_here", "times_of"]


@dataclass(frozen=True)
class Host:
    """Seconds of a step's host code beside its kernels: once on each stage, and for each op but views."""

    step_s: float = 0.0
    op_s: float = 0.0

    @classmethod
    def of(cls, few: tuple[float, int], more: tuple[float, int]) -> Host:
        """Of two models, the one with fewer ops first: what their ops differ in, and what is left."""
        op_s = max(0.0, more[0] - few[0]) / (more[1] - few[1])
        return cls(max(0.0, few[0] - op_s * few[1]), op_s)

    def beside(self, summary: Summary, plan: Plan) -> float:
        """Of a row's token: its stages follow each other, each with its own ops, however many groups take turns."""
        return plan.pp * self.step_s + self.op_s * summary.num_ops


def pricer_here(summary: Summary, kernels: Kernels, link: Dimension, device: Device) -> Pricer:
    """As `calibrate` and `link_of` have measured them."""
    pricer = Pricer(summary, Cluster("here", (link,), (device,)), overhead_s=0.0)
    pricer.kernels = kernels
    return pricer


def times_of(pricer: Pricer, plan: Plan, workload: Workload, host: Host) -> tuple[float, float]:
    """Seconds to the first token and between two. Raises `InputError` where the plan is refused."""
    price = pricer.price(plan, workload)
    if price.refused:
        raise InputError(f"{plan}: {price.refused}")
    beside = host.beside(pricer.summary, plan)
    return price.ttft_s + beside, price.tpot_s + beside
