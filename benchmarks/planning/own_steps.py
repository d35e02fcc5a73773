"""How much of the tables' speed whole steps of this product reach on a GPU, and predicted against measured steps.

    python -m benchmarks.planning.own_steps CACHE [--write]

CACHE: a folder for the model's summary. `own_steps.csv` holds measured steps of a Llama 3.1 8B shape in bfloat16 on 1
and 2 H200 of one host (torch 2.11, compiled steps), each with the script of `benchmarks/gpu` that measured it.

The share of an entry is fitted on the rows of one GPU; rows of two GPUs are held out, for their links are priced apart.
It makes the largest of the fitted rows' errors the smallest. --write keeps the shares (partitioner/planning/tables).
"""

from __future__ import annotations

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.planning.models import summary_of
from partitioner.planning.cluster import Cluster
from partitioner.planning.kernels import OWN_STEPS
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Seconds, Workload
from partitioner.planning.summary import Summary
from partitioner.program.plan import Plan

MODEL, DEVICE = "llama-3.1-8b", "H200"
MEASURED = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True)
class Step:
    """seconds: measured. priced: with kernels at the speed of their tables."""

    entry: str
    plan: str
    shape: str
    seconds: float
    priced: Seconds
    gpus: int

    def predicted(self, share: float) -> float:
        return self.priced.at_speed(share).total


def steps(summary: Summary) -> list[Step]:
    found = []
    with MEASURED.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            plan = Plan.parse(row["plan"])
            gpus = plan.mesh.world_size
            pricer = Pricer(summary, Cluster.parse(f"{gpus}x{DEVICE}"), own=False)
            rows, tokens, past = (int(row[name]) for name in ("rows", "tokens", "past"))
            workload = Workload(tokens, 1, rows) if row["entry"] == "prefill" else Workload(past, 1, rows)
            price = pricer.price(plan, workload)
            priced = price.prefill if row["entry"] == "prefill" else price.decode
            assert priced is not None, price.refused
            shape = f"{rows} x {tokens}" if row["entry"] == "prefill" else f"{rows} rows"
            found.append(Step(row["entry"], row["plan"], shape, float(row["ms"]) * 1e-3, priced, gpus))
    return found


def worst(mine: list[Step], share: float) -> float:
    return max(abs(each.predicted(share) / each.seconds - 1) for each in mine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    measured = steps(summary_of(MODEL, given.cache))
    shares = {}
    for entry in ("prefill", "decode"):
        alone = [each for each in measured if each.entry == entry and each.gpus == 1]
        shares[entry] = min(np.arange(0.5, 1.5, 0.005).round(3).tolist(), key=lambda share, of=alone: worst(of, share))
    print(f"{'entry':8} {'plan':5} {'step':10} {'measured':>9} {'tables':>9} {'ours':>9}")
    for each in measured:
        off = [each.predicted(share) / each.seconds - 1 for share in (1.0, shares[each.entry])]
        print(
            f"{each.entry:8} {each.plan:5} {each.shape:10} {each.seconds * 1e3:7.2f}ms {off[0]:+9.1%} {off[1]:+9.1%}"
            f"  {'fitted' if each.gpus == 1 else 'held out'}"
        )
    for gpus, kind in ((1, "fitted"), (2, "held out")):
        mine = [each for each in measured if each.gpus == gpus]
        tables, ours = (max(worst([s], share(s)) for s in mine) for share in (lambda _: 1.0, lambda s: shares[s.entry]))
        print(f"{kind}: the worst of {len(mine)} is off by {tables:.1%} at the tables' speed, by {ours:.1%} at ours")
    print("shares:", shares)
    if given.write:
        told = {
            "source": f"benchmarks/planning/{MEASURED.name}: steps of a {MODEL} shape on 1 {DEVICE}, torch 2.11",
            "made_by": "benchmarks/planning/own_steps.py",
            "devices": {f"{DEVICE.lower()}_sxm": shares},
        }
        OWN_STEPS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
