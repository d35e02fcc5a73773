"""How fast whole steps of this product are on a GPU, and predicted against measured steps.

    python -m benchmarks.planning.own_steps CACHE [--write]

CACHE: a folder for the models' summaries. `own_steps.csv` holds measured steps in bfloat16 on 1 and 2 H200 of one host
(torch 2.11, captured steps), each with the script of `benchmarks/gpu` that measured it: of a Llama 3.1 8B shape, and of
the shapes of `benchmarks.gpu.plans`, which have few layers.

    prefill     the share of the tables' speed that makes the largest error of the fitted rows the smallest
    streamed    of steps by rows, the share of the memory's speed with which they are what was measured
    attention   the same of caches, of a step of 16 rows behind 1,050 tokens each
    experts     of steps by rows, of the shape that has them, over the tables' speed

Each is fitted on rows of one GPU; rows of two GPUs and other models are held out. --write keeps them
(partitioner/planning/tables).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.planning.models import SHAPES, summary_of
from benchmarks.support.step_shapes import CASES, FITTED, model_of
from partitioner.compile.partition import trace
from partitioner.planning.cluster import Cluster
from partitioner.planning.kernels import OWN_STEPS, Grid, OwnSteps
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary, summarize_program
from partitioner.program.plan import Plan

WHOLE, FEW_LAYERS, WITH_EXPERTS = "llama-3.1-8b", "llama 8b", "qwen3 30b-a3b"
DEVICE = "H200"
POSITIONS = 1076
TURNS = 5
MEASURED = Path(__file__).with_suffix(".csv")
Shapes = Mapping[str, Summary]


@dataclass(frozen=True)
class Step:
    """seconds: measured. past: tokens in the caches before it."""

    entry: str
    model: str
    plan: str
    rows: int
    tokens: int
    past: int
    seconds: float

    @property
    def gpus(self) -> int:
        return Plan.parse(self.plan).mesh.world_size

    @property
    def is_fitted(self) -> bool:
        return self.gpus == 1 and self.model in (WHOLE, FEW_LAYERS, WITH_EXPERTS)

    def predicted(self, shapes: Shapes, own: OwnSteps | bool) -> float:
        pricer = Pricer(shapes[self.model], Cluster.parse(f"{self.gpus}x{DEVICE}"), own=own)
        before = self.tokens if self.entry == "prefill" else self.past
        price = pricer.price(Plan.parse(self.plan), Workload(before, 1, self.rows))
        assert not price.refused, price.refused
        return price.ttft_s if self.entry == "prefill" else price.tpot_s

    def off(self, shapes: Shapes, own: OwnSteps | bool) -> float:
        return self.predicted(shapes, own) / self.seconds - 1


def steps() -> list[Step]:
    with MEASURED.open(encoding="utf-8") as file:
        return [
            Step(row["entry"], row["model"], row["plan"], *(int(row[name]) for name in ("rows", "tokens", "past")),
                 float(row["ms"]) * 1e-3)
            for row in csv.DictReader(file)
        ]  # fmt: skip


def shapes_of(measured: Sequence[Step], cache: Path) -> Shapes:
    return {name: _shape(name, cache) for name in {each.model for each in measured}}


def _shape(name: str, cache: Path) -> Summary:
    if (SHAPES / f"{name}.json").is_file():
        return summary_of(name, cache)
    kept = cache / f"{name}, few layers.pickle"
    if not kept.is_file():
        model = model_of((CASES | FITTED)[name], POSITIONS)
        kept.write_bytes(pickle.dumps(summarize_program(trace(model))))
    found: Summary = pickle.loads(kept.read_bytes())
    return found


def solved(step: Step, shapes: Shapes, own: OwnSteps, name: str) -> float:
    """The share of that name at which a step takes as long as was measured: it is a constant, and a part over it."""
    ways = [with_share(own, name, share) for share in (1.0, 0.5)]
    at_one, at_half = (step.predicted(shapes, way) for way in ways)
    part = at_half - at_one
    return round(part / (step.seconds - (at_one - part)), 3)


def with_share(own: OwnSteps, name: str, share: float) -> OwnSteps:
    """The same for all numbers of rows."""
    if name == "attention":
        return replace(own, attention=share)
    every = by_rows({1: share})
    return replace(own, streamed=every) if name == "streamed" else replace(own, experts=every)


def by_rows(shares: Mapping[int, float]) -> Grid:
    return Grid((tuple(map(math.log2, shares)),), list(shares.values()))


def fitted(shapes: Shapes, measured: Sequence[Step]) -> OwnSteps:
    own = OwnSteps(1.0, by_rows({1: 1.0}))
    alone = sorted((each for each in measured if each.is_fitted), key=lambda each: each.rows)
    at_tables = {each: each.predicted(shapes, own) for each in alone if each.entry == "prefill"}

    def worst(share: float) -> float:
        return max(abs(seconds / share / each.seconds - 1) for each, seconds in at_tables.items())

    own = replace(own, prefill=min(np.arange(0.5, 1.5, 0.005).round(3).tolist(), key=worst))
    of = {name: [each for each in alone if (each.entry, each.model) == ("decode", name)] for name in shapes}
    (behind_many,) = of[FEW_LAYERS]
    for _ in range(TURNS):  # each is part of the other's steps
        own = replace(own, streamed=by_rows({each.rows: solved(each, shapes, own, "streamed") for each in of[WHOLE]}))
        own = replace(own, attention=solved(behind_many, shapes, own, "attention"))
    return replace(own, experts=by_rows({each.rows: solved(each, shapes, own, "experts") for each in of[WITH_EXPERTS]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    measured = steps()
    shapes = shapes_of(measured, given.cache)
    own = fitted(shapes, measured)
    print(f"{'entry':8} {'model':14} {'plan':10} {'step':10} {'measured':>9} {'tables':>9} {'ours':>9}")
    for each in measured:
        shape = f"{each.rows} x {each.tokens}" if each.entry == "prefill" else f"{each.rows} rows"
        print(
            f"{each.entry:8} {each.model:14} {each.plan:10} {shape:10} {each.seconds * 1e3:7.2f}ms "
            f"{each.off(shapes, False):+9.1%} {each.off(shapes, own):+9.1%}  "
            f"{'fitted' if each.is_fitted else 'held out'}"
        )
    for is_fitted, kind in ((True, "fitted"), (False, "held out")):
        mine = [each for each in measured if each.is_fitted is is_fitted]
        for how, name in ((False, "the tables' speed"), (own, "ours")):
            off = [abs(each.off(shapes, how)) for each in mine]
            print(f"{kind}, at {name}: {sum(each <= 0.08 for each in off)} of {len(off)} within 8%, all {max(off):.1%}")
    print(own)
    if given.write:
        told = {
            "source": f"benchmarks/planning/{MEASURED.name}: steps on 1 {DEVICE}, torch 2.11",
            "made_by": "benchmarks/planning/own_steps.py",
            "devices": {f"{DEVICE.lower()}_sxm": own.to_json()},
        }
        OWN_STEPS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
