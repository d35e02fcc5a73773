"""The planner's order of plans on several GPUs of one host against the measured one: Kendall's tau, and the regret.

    predicted   seconds to the last token of a batch, as `partitioner plan` ranks them, nothing fitted on these plans
    measured    the same through `generate`; decode steps are captured but for those of pipeline stages, which are not
    regret      how much slower the plan that is ranked first is than the one that was measured to be the fastest

Of the plans that use all GPUs, `--plans` many from the first to the last of the ranking, a Llama-3-8B shape in bfloat16
with weights drawn on the devices. Each plan has ranks of its own; the slowest counts, of the rounds the median.

    python -m benchmarks.gpu.plans --ranks 8 --layers 8 --cluster 8xH200
    python -m benchmarks.gpu.plans --ranks 8 --plan tp=8 tp=4,pp=2 dp=2,tp=4
    python -m benchmarks.gpu.plans --ranks 2 --device cpu --small --rounds 1

Without --cluster the devices are measured first, as `partitioner plan` does without one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from itertools import combinations
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once

import torch

from benchmarks.gpu.pipeline import drawn_ids
from benchmarks.support.decoders import DrawnWeights, decoder
from benchmarks.support.several import device_of_rank, options, sharing, start, synchronize
from partitioner import Plan, partition
from partitioner.planning.cluster import Cluster
from partitioner.planning.machine.detect import detect
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.search import plans
from partitioner.planning.summary import summarize
from runtime.engine import Engine
from runtime.processes.launch import write_answer


def workload_of(given: argparse.Namespace) -> Workload:
    small = given.small
    return Workload(
        given.prompt or (40 if small else 4096), given.new or (6 if small else 64), given.batch or (4 if small else 16)
    )


def model_of(given: argparse.Namespace, workload: Workload, device: torch.device) -> Any:
    positions = workload.prompt + workload.new
    return decoder("small" if given.small else "8b", layers=given.layers, positions=positions, device=device)


@torch.no_grad()
def rank(given: argparse.Namespace) -> None:
    device, plan, workload = device_of_rank(given), Plan.parse(given.part), workload_of(given)
    model = model_of(given, workload, device)
    ids = drawn_ids(workload.batch, workload.prompt, model.config.vocab_size, device)
    with Engine.connect(
        partition(model, plan), DrawnWeights(model, device), device=device.type, timeout_s=300,
        shared_memory=sharing(device), cuda_graph=device.type == "cuda" and plan.pp == 1,
    ) as engine:  # fmt: skip
        times = []
        for _ in range(given.rounds + 1):
            synchronize(device)
            began = time.perf_counter()
            engine.generate(ids, max_new_tokens=workload.new, eos_token_id=[], do_sample=False)
            synchronize(device)
            times.append(time.perf_counter() - began)
        write_answer(json.dumps(times[1:]).encode())


def cluster_of(given: argparse.Namespace) -> Cluster:
    if given.cluster:
        return Cluster.parse(given.cluster)
    found = detect()
    return replace(found, dimensions=(replace(found.dimensions[0], size=given.ranks),))


def predictions(given: argparse.Namespace, workload: Workload) -> dict[str, float]:
    """Seconds, by plan, the shortest first."""
    device = torch.device(given.device)
    summary, cluster = summarize(model_of(given, workload, device)), cluster_of(given)
    pricer = Pricer(summary, cluster)
    if given.plan:
        wanted = [Plan.parse(text) for text in given.plan]
    else:
        wanted = [plan for plan in plans(summary, cluster, workload) if plan.mesh.world_size == given.ranks]
    prices = [pricer.price(plan, workload) for plan in wanted]
    for price in prices:
        if price.refused:
            print(f"left out: {price.plan}: {price.refused}")
    ranked = sorted((price.latency_s, str(price.plan)) for price in prices if not price.refused)
    if not given.plan and len(ranked) > given.plans:
        ranked = [ranked[round(i * (len(ranked) - 1) / (given.plans - 1))] for i in range(given.plans)]
    return {plan: seconds for seconds, plan in ranked}


def kendall(pairs: list[tuple[float, float]]) -> float:
    """Of all pairs of plans, the share in the same order less the share in the other one."""
    agrees = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(pairs, 2)]
    return sum((each > 0) - (each < 0) for each in agrees) / len(agrees)


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--plans", type=int, default=12, help="how many, from the first of the ranking to the last")
    parser.add_argument("--plan", nargs="+", help="these instead")
    parser.add_argument("--cluster", help='such as "8xH200"; without it the devices are measured')
    for name in ("prompt", "new", "batch"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    is_rank = "RANK" in os.environ
    predicted = {} if is_rank else predictions(given, workload_of(given))
    start(
        "benchmarks.gpu.plans", given, parts=list(predicted), rank=rank,
        told=lambda answers: table(given, predicted, answers),
    )  # fmt: skip


def table(given: argparse.Namespace, predicted: dict[str, float], answers: dict[str, list[bytes]]) -> None:
    measured = {
        plan: statistics.median(map(max, zip(*map(json.loads, of_ranks), strict=True)))
        for plan, of_ranks in answers.items()
    }
    print(f"{given.ranks} ranks, {workload_of(given)}: seconds to the last token")
    print(f"{'plan':28} {'predicted':>10} {'measured':>10}")
    for plan, seconds in measured.items():
        print(f"{plan:28} {predicted[plan]:10.4f} {seconds:10.4f}")
    if len(measured) > 1:
        first, fastest = next(iter(measured)), min(measured, key=measured.__getitem__)
        tau = kendall([(predicted[plan], seconds) for plan, seconds in measured.items()])
        print(
            f"{len(measured)} plans: Kendall's tau {tau:.2f}; the first, {first}, is "
            f"{measured[first] / measured[fastest] - 1:.1%} slower than the fastest, {fastest}"
        )


if __name__ == "__main__":
    main()
