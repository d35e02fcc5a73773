"""What `partitioner bench plan` does: a plan is run on this machine, and priced by what was measured on it."""

from __future__ import annotations

import json
import statistics
from typing import Any

from partitioner.cli.jobs.bench_plan import PlanCase
from partitioner.planning.cluster import Cluster, Dimension
from partitioner.planning.cluster import Device as Machine
from partitioner.planning.kernels import Kernels
from partitioner.planning.machine.host import Host, pricer_here, times_of
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.summary import Summary
from partitioner.storage.named_model import load_config
from runtime.processes.launch import launch
from runtime.processes.place import Place

__all__ = ["measure", "predicted"]


def predicted(
    summary: Summary, case: PlanCase, host: Host, found: tuple[Kernels, Dimension, Machine] | None
) -> tuple[float, float]:
    """Seconds to the first token and between two. found: what was calibrated here; None: the cluster's tables."""
    pricer = Pricer(summary, Cluster.parse(str(case.gpus))) if found is None else pricer_here(summary, *found)
    return times_of(pricer, case.plan, case.workload, host)


def measure(case: PlanCase, *, timeout_s: float) -> dict[str, Any]:
    """Both in seconds; measured ones are those of the rank that takes longest."""
    load_config(case.model, small=True)  # here once, rather than on every rank: a wrong name should be one line
    answers = [
        json.loads(answer)
        for answer in launch(
            ["partitioner.cli.ranks.bench_rank"],
            num_ranks=case.plan.mesh.world_size,
            timeout_s=timeout_s,
            given=case.to_json().encode(),
            name=Place(case.plan.replica_mesh, 0, 0, case.plan.replicas).name_of_all,
        )
    ]
    measured = {what: max(answer["measured"][what] for answer in answers) for what in ("ttft_s", "tpot_s")}
    foretold = {what: statistics.fmean(answer["predicted"][what] for answer in answers) for what in measured}
    return {"plan": str(case.plan), "predicted": foretold, "measured": measured, "by": answers[0]["by"]}
