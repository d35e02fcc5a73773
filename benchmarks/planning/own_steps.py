"""How fast whole steps of this product are on a GPU, and predicted against measured steps.

    python -m benchmarks.planning.own_steps CACHE [--write]

CACHE: a folder for the model's summary. `own_steps.csv` holds measured steps of a Llama 3.1 8B shape in bfloat16 on 1
and 2 H200 of one host (torch 2.11, captured steps), each with the script of `benchmarks/gpu` that measured it.

    prefill     the share of the tables' speed that makes the largest error of the fitted rows the smallest
    streamed    of steps by rows, the share of the memory's speed with which they are what was measured

Fitted on the rows of one GPU; rows of two GPUs are held out, for their links are priced apart. --write keeps both
(partitioner/planning/tables).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.planning.models import summary_of
from partitioner.planning.cluster import Cluster
from partitioner.planning.kernels import OWN_STEPS, Grid, OwnSteps
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary
from partitioner.program.plan import Plan

MODEL, DEVICE = "llama-3.1-8b", "H200"
MEASURED = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True)
class Step:
    """seconds: measured. past: tokens in the caches before it."""

    entry: str
    plan: str
    rows: int
    tokens: int
    past: int
    seconds: float

    @property
    def gpus(self) -> int:
        return Plan.parse(self.plan).mesh.world_size

    def predicted(self, summary: Summary, own: OwnSteps | bool) -> float:
        pricer = Pricer(summary, Cluster.parse(f"{self.gpus}x{DEVICE}"), own=own)
        before = self.tokens if self.entry == "prefill" else self.past
        price = pricer.price(Plan.parse(self.plan), Workload(before, 1, self.rows))
        assert not price.refused, price.refused
        return price.ttft_s if self.entry == "prefill" else price.tpot_s

    def off(self, summary: Summary, own: OwnSteps | bool) -> float:
        return self.predicted(summary, own) / self.seconds - 1


def steps() -> list[Step]:
    with MEASURED.open(encoding="utf-8") as file:
        return [
            Step(row["entry"], row["plan"], *(int(row[name]) for name in ("rows", "tokens", "past")),
                 float(row["ms"]) * 1e-3)
            for row in csv.DictReader(file)
        ]  # fmt: skip


def fitted(summary: Summary, measured: Sequence[Step]) -> OwnSteps:
    """On the steps of one GPU."""
    alone = [each for each in measured if each.gpus == 1]
    unknown = OwnSteps(1.0, Grid(((0.0,),), [1.0]))
    prompts = [each for each in alone if each.entry == "prefill"]
    at_tables = {each: each.predicted(summary, unknown) for each in prompts}

    def worst(share: float) -> float:
        return max(abs(seconds / share / each.seconds - 1) for each, seconds in at_tables.items())

    prefill = min(np.arange(0.5, 1.5, 0.005).round(3).tolist(), key=worst)
    shares = {}
    for each in sorted((each for each in alone if each.entry == "decode"), key=lambda each: each.rows):
        # a step is a constant, and what it streams over the share
        at = [each.predicted(summary, OwnSteps(1.0, Grid(((0.0,),), [share]))) for share in (1.0, 0.5)]
        streams = at[1] - at[0]
        shares[each.rows] = streams / (each.seconds - (at[0] - streams))
    return OwnSteps(prefill, Grid((tuple(map(math.log2, shares)),), [round(each, 3) for each in shares.values()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    measured, summary = steps(), summary_of(MODEL, given.cache)
    own = fitted(summary, measured)
    print(f"{'entry':8} {'plan':5} {'step':10} {'measured':>9} {'tables':>9} {'ours':>9}")
    for each in measured:
        shape = f"{each.rows} x {each.tokens}" if each.entry == "prefill" else f"{each.rows} rows"
        print(
            f"{each.entry:8} {each.plan:5} {shape:10} {each.seconds * 1e3:7.2f}ms {each.off(summary, False):+9.1%} "
            f"{each.off(summary, own):+9.1%}  {'fitted' if each.gpus == 1 else 'held out'}"
        )
    for gpus, kind in ((1, "fitted"), (2, "held out")):
        mine = [each for each in measured if each.gpus == gpus]
        tables, ours = (max(abs(each.off(summary, how)) for each in mine) for how in (False, own))
        print(f"{kind}: the worst of {len(mine)} is off by {tables:.1%} at the tables' speed, by {ours:.1%} at ours")
    print(own)
    if given.write:
        rows = [round(2**each) for each in own.streamed.axes[0]]
        told = {
            "source": f"benchmarks/planning/{MEASURED.name}: steps of a {MODEL} shape on 1 {DEVICE}, torch 2.11",
            "made_by": "benchmarks/planning/own_steps.py",
            "devices": {
                f"{DEVICE.lower()}_sxm": {
                    "prefill": own.prefill,
                    "streamed": {"rows": rows, "shares": own.streamed.values},
                }
            },
        }
        OWN_STEPS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
