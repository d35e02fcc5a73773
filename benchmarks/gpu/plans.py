"""Plans on several GPUs of one host: a step and a first token as predicted and as measured, and the choice by them.

    predicted   `Pricer` over the tables of the cluster, with the speed that this product's steps reach of them
                (`benchmarks/planning/own_steps.py`); nothing is fitted on what is printed of `CASES`
    measured    seconds between two tokens of greedy generation, as its stream yields them from the `SETTLED`th one to
                the last, and to the first tokens of all requests: of the rank that takes longest, the median of the
                rounds; steps and prompts are captured
    longest     from one of these tokens to the next, over the mean: far above 1, something else was in a round
    regret      how much longer a step of the plan with the shortest predicted one takes than the shortest measured one
    tau         Kendall's, of all plans of a model in the order of their steps

Shapes in bfloat16 with few of their layers, whose weights are drawn on the devices: those of `CASES` are Llama 3.1 8B
and 70B, Qwen3 32B and Qwen3 30B-A3B (128 experts); `--models` may name those of `FITTED`, on which prices are fitted.
Two ranks run the plans of their shape; for more, plans are taken from the first to the last of the ranking, or named. A
case is printed when it is done, and one that fails is told. Nothing is captured, compiled or compared for the first
time in what is timed: each case runs `WARM_UPS` times before, and captures in its rounds are told.

    python -m benchmarks.gpu.plans --ranks 2                               18 cases, two or three minutes
    python -m benchmarks.gpu.plans --ranks 2 --models "llama 8b" --batch 16 1
    python -m benchmarks.gpu.plans --ranks 8 --cluster 8xH200 --plans 12
    python -m benchmarks.gpu.plans --ranks 8 --plan tp=8 tp=4,pp=2 dp=2,tp=4
    python -m benchmarks.gpu.plans --ranks 1 --models dense half large --batch 32 8 1
    python -m benchmarks.gpu.plans --ranks 2 --device cpu --small --rounds 1

--cluster: whose tables predict; without it, so many of the GPU that is there, or what `cluster detect` measures where
nothing is known of it.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once

import torch
from torch import Tensor

from benchmarks.gpu.pipeline import alone, drawn_ids
from benchmarks.support.decoders import DrawnWeights
from benchmarks.support.several import DeviceTurns, device_of_rank, options, sharing, start, synchronize
from benchmarks.support.step_shapes import CASES, FITTED, ONE, Shape, model_of
from partitioner import Plan
from partitioner.compile.partition import compile_program, trace
from partitioner.errors import InputError, PartitionerError
from partitioner.planning.cluster import Cluster
from partitioner.planning.machine.detect import detect
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Price, Workload
from partitioner.planning.search import plans
from partitioner.planning.summary import Summary, summarize_program
from runtime.engine import Engine

SHAPES = CASES | FITTED
WARM_UPS = 3
"""Generations before those that are timed: a prompt's first runs node by node, and its second is captured."""
SETTLED = 8
"""Tokens of a generation before those that steps are timed between."""


@dataclass(frozen=True)
class Found:
    """Seconds to the first tokens of all requests, and of a step. longest: step, over the mean. captures: in rounds."""

    first: float
    step: float
    longest: float
    captures: int


def workloads_of(given: argparse.Namespace) -> list[Workload]:
    """The one with the most requests first: its cache has room for the others."""
    small = given.small
    sizes = sorted(given.batch or [4 if small else 16], reverse=True)
    return [
        Workload(given.prompt or (40 if small else 1024), given.new or (10 if small else 52), size) for size in sizes
    ]


def drawn_model(shape: Shape, given: argparse.Namespace, device: torch.device) -> Any:
    workload = workloads_of(given)[0]
    return model_of(
        shape, workload.prompt + workload.new, layers=given.layers, small=given.small,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )  # fmt: skip


def cluster_of(given: argparse.Namespace) -> Cluster:
    if given.cluster:
        return Cluster.parse(given.cluster)
    if given.device == "cuda":
        name = torch.cuda.get_device_name().rpartition(" ")[2]
        try:
            return Cluster.parse(f"{given.ranks}x{name}")
        except InputError:
            print(f"nothing is known of {name}: measured", flush=True)
    found = detect()
    return replace(found, dimensions=(replace(found.dimensions[0], size=given.ranks),))


def chosen(shape: Shape, given: argparse.Namespace, summary: Summary, cluster: Cluster) -> Sequence[str]:
    """Plans, by their text."""
    if given.plan:
        return tuple(given.plan)
    if given.ranks <= 2:
        return [plan for plan in shape.plans if plan == ONE or given.ranks == 2]
    workload, pricer = workloads_of(given)[0], Pricer(summary, cluster)
    wanted = [plan for plan in plans(summary, cluster, workload) if plan.mesh.world_size == given.ranks]
    prices = [pricer.price(plan, workload) for plan in wanted]
    ranked = sorted((price.latency_s, str(price.plan)) for price in prices if not price.refused)
    if len(ranked) > given.plans:
        ranked = [ranked[round(i * (len(ranked) - 1) / (given.plans - 1))] for i in range(given.plans)]
    return [plan for _, plan in ranked]


def price_of(summary: Summary, cluster: Cluster, plan: str, workload: Workload) -> Price:
    """Of one GPU by itself: a cluster of one."""
    size = 1 if plan == ONE else cluster.size
    within = replace(cluster, dimensions=(replace(cluster.dimensions[0], size=size), *cluster.dimensions[1:]))
    return Pricer(summary, within).price(Plan.parse(plan), workload)


def measured(engine: Engine, plan: Plan, ids: Tensor, turns: DeviceTurns, new: int, rounds: int) -> Found:
    """Of the rank that takes longest. ids: of all requests; a replica is timed with its own."""
    replica = int(os.environ["RANK"]) // plan.replica_mesh.world_size if plan.replicas > 1 else 0
    mine, settled = ids.tensor_split(plan.replicas)[replica], min(SETTLED, new - 2)

    def run() -> tuple[float, float, float]:
        request = engine.request(mine, max_new_tokens=new, eos_token_id=[], do_sample=False)
        turns.meet()
        began = time.perf_counter()
        at = [time.perf_counter() for _ in engine.steps(request)]
        synchronize(turns.device)
        between = [after - before for before, after in pairwise(at[settled - 1 :])]
        return at[0] - began, statistics.fmean(between), max(between)

    for _ in range(WARM_UPS):
        run()
    with captures() as counted:
        times = [turns.slowest(run()) for _ in range(rounds)]
    (captured,) = turns.slowest([len(counted)])
    first, step, longest = (statistics.median(each) for each in zip(*times, strict=True))
    return Found(first, step, longest / step, round(captured))


@contextmanager
def captures() -> Iterator[list[None]]:
    """One for each CUDA graph that this process captures in the block."""
    counted: list[None] = []
    capture = torch.cuda.graph.__enter__

    def counting(graph: torch.cuda.graph) -> None:
        counted.append(None)
        capture(graph)

    with patch.object(torch.cuda.graph, "__enter__", counting):
        yield counted


@torch.no_grad()
def rank(given: argparse.Namespace) -> None:
    device, workloads, began = device_of_rank(given), workloads_of(given), time.perf_counter()
    turns, is_first, cluster = DeviceTurns(device), os.environ["RANK"] == "0", cluster_of(given)

    def say(text: str) -> None:
        if is_first:
            print(text, flush=True)

    say(f"{cluster.name}, prompts of {workloads[0].prompt}; ms of a step, and to the first tokens of all requests")
    say(
        f"{'model':14} {'plan':10} {'batch':>5} {'predicted':>9} {'measured':>9} {'off':>6} "
        f"{'first':>9} {'measured':>9} {'off':>6} {'longest':>7}"
    )
    steps: dict[str, dict[str, tuple[float, float]]] = {}
    for name in given.models:
        shape = SHAPES[name]
        model = drawn_model(shape, given, device)
        traced, weights = trace(model), DrawnWeights(model, device)
        summary = summarize_program(traced)
        for plan in chosen(shape, given, summary, cluster):
            prices = {each.batch: price_of(summary, cluster, plan, each) for each in workloads}
            try:
                engine = engine_of(traced, plan, weights, device)
                for workload in workloads:
                    price = prices[workload.batch]
                    why = "fewer than replicas" if workload.batch < Plan.parse(plan).replicas else price.refused
                    if why:
                        say(f"left out: {name}, {plan}, {workload.batch} requests: {why}")
                        continue
                    ids = drawn_ids(workload.batch, workload.prompt, model.config.vocab_size, device)
                    found = measured(engine, Plan.parse(plan), ids, turns, workload.new, given.rounds)
                    steps.setdefault(f"{name}, {workload.batch}", {})[plan] = price.tpot_s, found.step
                    pairs = ((price.tpot_s, found.step), (price.ttft_s, found.first))
                    said = "".join(f" {a * 1e3:9.3f} {b * 1e3:9.3f} {a / b - 1:+6.1%}" for a, b in pairs)
                    said += f" {found.longest:7.1f}" + f" {found.captures} captures!" * bool(found.captures)
                    say(f"{name:14} {plan:10} {workload.batch:5}{said}  {time.perf_counter() - began:4.0f} s")
                release(engine, plan)
                del engine
            except (PartitionerError, RuntimeError) as error:
                print(f"left out: {name}, {plan}: {type(error).__name__}: {error}", flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        for workload in workloads:
            case = f"{name}, {workload.batch}"
            say(choice_of(case, steps.get(case, {})))
    say(within(steps))


def engine_of(traced: Any, plan: str, weights: Callable[..., Tensor], device: torch.device) -> Engine:
    parts, captured = compile_program(traced, Plan.parse(plan)), device.type == "cuda"
    if plan == ONE:
        return alone(parts, weights, device, cuda_graph=captured)  # type: ignore[arg-type]
    return Engine.connect(
        parts, weights, device=device.type, timeout_s=120, shared_memory=sharing(device), cuda_graph=captured
    )


def release(engine: Engine, plan: str) -> None:
    if plan == ONE:
        engine._generate_loop.release()
    else:
        engine.close()


def kendall(pairs: list[tuple[float, float]]) -> float:
    """Of all pairs of plans, the share in the same order less the share in the other one."""
    agrees = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(pairs, 2)]
    return sum((each > 0) - (each < 0) for each in agrees) / len(agrees)


def choice_of(name: str, steps: Mapping[str, tuple[float, float]]) -> str:
    """steps: by plan, as predicted and as measured."""
    several = {plan: each for plan, each in steps.items() if plan != ONE}
    if len(several) < 2:
        return f"{name}: no choice"
    first = min(several, key=lambda plan: several[plan][0])
    best = min(several, key=lambda plan: several[plan][1])
    regret = several[first][1] / several[best][1] - 1
    tau = kendall(list(several.values()))
    return (
        f"{name}: {len(several)} plans, Kendall's tau {tau:.2f}; the first choice, {first}, is {regret:.1%} slower "
        f"than the fastest, {best}"
    )


def within(steps: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    off = [abs(a / b - 1) for of_model in steps.values() for a, b in of_model.values()]
    return f"steps within 8%: {sum(each <= 0.08 for each in off)} of {len(off)} cases"


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(CASES))
    parser.add_argument("--layers", type=int, help="instead of those of `CASES`")
    parser.add_argument("--plans", type=int, default=12, help="how many, from the first of the ranking to the last")
    parser.add_argument("--plan", nargs="+", help="these instead")
    parser.add_argument("--cluster", help='such as "8xH200"')
    for name in ("prompt", "new"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--batch", type=int, nargs="+", help="requests at a time")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "RANK" not in os.environ and not given.cluster:  # once: ranks that measured it each would choose other plans
            file = Path(folder) / "cluster.yaml"
            file.write_text(cluster_of(given).to_yaml(), encoding="utf-8")
            sys.argv += ["--cluster", str(file)]
        start("benchmarks.gpu.plans", given, parts=("plans",), rank=rank)


if __name__ == "__main__":
    main()
