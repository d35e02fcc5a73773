"""How fast whole steps of this product are on a GPU, and predicted against measured steps.

    python -m benchmarks.planning.own_steps CACHE [--write]

CACHE: a folder for the models' summaries. `own_steps.csv` holds steps in bfloat16 on 1 and 2 H200 of one host (torch
2.11, captured steps), each with the script of `benchmarks/gpu` that measured it: of a Llama 3.1 8B shape, and of the
shapes of `benchmarks.support.step_shapes`, which have few layers.

    steps       of one row and of several: shares of the memory's speed, and times of each kernel besides, with which
                steps of one GPU are what was measured, by least squares of relative errors
    prompts     the share of the tables' speed that makes the largest error of long ones the smallest; what is left of
                short ones; and a time of each op, of those that are not captured
    between     of a thin shape over two GPUs: all-reduces and stages' turns, each as it makes the largest error of the
                rows that have it the smallest; a message, by how much longer two groups' turns of the 8B take than its
                stages by themselves

The shapes of `CASES`, and the 8B over two GPUs, are held out. --write keeps what was found in
partitioner/planning/tables.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import pickle
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planning.models import SHAPES, summary_of
from benchmarks.support.step_shapes import CASES, FITTED, model_of
from partitioner.compile.tracing.trace import trace
from partitioner.planning.cluster import Cluster
from partitioner.planning.pricing.own_steps import OWN_STEPS, OwnSteps, StepShares
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary, summarize_program
from partitioner.program.plan import Plan

WHOLE, THIN = "llama-3.1-8b", "thin"
DEVICE = "H200"
POSITIONS = 1076
MEASURED = Path(__file__).with_suffix(".csv")
DENSE = [name for name, shape in FITTED.items() if shape.kind != "qwen3_moe" and name != THIN]
Pricers = Callable[[str, int], Pricer]
SHARES, TIMES = ("streamed", "attention", "experts"), ("product_s", "attention_s", "experts_s", "norm_s", "step_s")
NO_STEP = StepShares(math.inf, math.inf, math.inf)
NOTHING = OwnSteps(1.0, NO_STEP, NO_STEP)


@dataclass(frozen=True)
class Step:
    """seconds: measured. past: tokens in the caches before it. entry: "decode", "prefill"; "eager", a prompt that is
    not captured; "turn", a group's of two on two stages; "stage", the mean of these by themselves.
    """

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
        return self.model in FITTED or (self.model == WHOLE and self.gpus == 1)

    def predicted(self, pricers: Pricers, own: OwnSteps | None) -> float:
        """own: None: at the tables' speed."""
        pricer = pricers(self.model, self.gpus) if own is None else pricers(self.model, self.gpus).at_steps(own)
        before = self.tokens if self.entry == "prefill" else self.past
        price = pricer.price(Plan.parse(self.plan), Workload(before, 1, self.rows))
        assert not price.refused, price.refused
        return price.ttft_s if self.entry == "prefill" else price.tpot_s

    def off(self, pricers: Pricers, own: OwnSteps | None) -> float:
        return self.predicted(pricers, own) / self.seconds - 1


def steps() -> list[Step]:
    with MEASURED.open(encoding="utf-8") as file:
        return [
            Step(row["entry"], row["model"], row["plan"], *(int(row[name]) for name in ("rows", "tokens", "past")),
                 float(row["ms"]) * 1e-3)
            for row in csv.DictReader(file)
        ]  # fmt: skip


def pricers_in(cache: Path) -> Pricers:
    """By the name of a model, and how many GPUs; cache: of summaries."""

    @functools.cache
    def shape(name: str) -> Summary:
        if (SHAPES / f"{name}.json").is_file():
            return summary_of(name, cache)
        kept = cache / f"{name}, few layers.pickle"
        if not kept.is_file():
            kept.write_bytes(pickle.dumps(summarize_program(trace(model_of((CASES | FITTED)[name], POSITIONS)))))
        found: Summary = pickle.loads(kept.read_bytes())
        return found

    @functools.cache
    def pricer(name: str, gpus: int) -> Pricer:
        return Pricer(shape(name), Cluster.parse(f"{gpus}x{DEVICE}"), own=False)

    return pricer


def fitted(pricers: Pricers, measured: Sequence[Step]) -> OwnSteps:
    by_entry: dict[str, list[Step]] = {}
    for each in measured:
        if each.is_fitted or each.entry in ("turn", "stage"):
            by_entry.setdefault(each.entry, []).append(each)
    decode, prefill = by_entry["decode"], by_entry["prefill"]
    alone = [each for each in decode if each.gpus == 1]
    several = shares_of(pricers, [each for each in alone if each.rows > 1], known={})
    # how far attention is from the memory's speed shows in many rows
    one = shares_of(pricers, [each for each in alone if each.rows == 1], known={"attention": several.attention})
    own = OwnSteps(1.0, one, several)
    long = [each for each in prefill if each.model == WHOLE]
    own = replace(own, prefill=least(pricers, long, own, "prefill", np.arange(0.5, 1.5, 0.005)))
    short = [each for each in prefill if each.model in DENSE and each.gpus == each.rows == 1]
    own = replace(own, first_s=statistics.median(each.seconds - each.predicted(pricers, own) for each in short))
    own = replace(own, first_s=round(own.first_s, 5))
    eager = [(each.seconds - own.first_s) / pricers(each.model, 1).summary.num_ops for each in by_entry["eager"]]
    (turn,), (stage,) = by_entry["turn"], by_entry["stage"]
    own = replace(own, op_s=round(statistics.median(eager), 7), message_s=round(turn.seconds - stage.seconds, 7))
    microseconds = np.arange(0, 2000, 5) * 1e-6
    between: dict[str, tuple[Any, Callable[[Step], bool]]] = {
        "reduces": (np.arange(0.5, 5, 0.05), lambda each: each.plan == "tp=2"),
        "turn_s": (microseconds, lambda each: each.plan == "pp=2" and each.model == THIN),
    }
    for name, (values, has_it) in between.items():
        if rows := [each for each in decode if has_it(each)]:
            own = replace(own, **{name: least(pricers, rows, own, name, values)})
    return own


def least(pricers: Pricers, rows: Sequence[Step], own: OwnSteps, name: str, values: Any) -> float:
    """With which of the values of that name the largest error of the rows is the smallest."""

    def worst(value: float) -> float:
        return max(abs(each.off(pricers, replace(own, **{name: value}))) for each in rows)

    return min(values.round(7).tolist(), key=worst)  # type: ignore[no-any-return]


def shares_of(pricers: Pricers, rows: Sequence[Step], *, known: Mapping[str, float]) -> StepShares:
    """Of steps that are all of one row, or all of several: by least squares of relative errors.

    A step's seconds are a sum: of its bytes over the speeds that are looked for, and of its kernels times their times.
    What comes out below 0 is left out, the lowest first. known: shares that are not looked for.
    """
    parts = {name: replace(NO_STEP, **{name: 1.0}) for name in SHARES}
    parts |= {name: replace(NO_STEP, **{name: 1e-6}) for name in TIMES}

    def seconds(each: Step, shares: StepShares) -> float:
        return each.predicted(pricers, OwnSteps(1.0, shares, shares))

    base = np.array([seconds(each, NO_STEP) for each in rows])
    takes = {name: np.array([seconds(each, part) for each in rows]) - base for name, part in parts.items()}
    measured = np.array([each.seconds for each in rows])
    left = measured - base - sum(takes[name] / share for name, share in known.items())
    wanted = [name for name in parts if name not in known]
    while True:
        found, *_ = np.linalg.lstsq(np.stack([takes[name] / measured for name in wanted], 1), left / measured)
        if (found >= 0).all():
            break
        wanted.pop(int(found.argmin()))
    by_name = dict(zip(wanted, found.tolist(), strict=True))
    shares = {name: round(1 / by_name[name], 3) for name in SHARES if by_name.get(name)}
    return replace(
        StepShares(1.0), **shares, **known, **{name: round(by_name.get(name, 0.0) * 1e-6, 8) for name in TIMES}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    measured = steps()
    pricers = pricers_in(given.cache)
    own = fitted(pricers, measured)
    print(f"{'entry':8} {'model':14} {'plan':10} {'step':10} {'measured':>9} {'tables':>9} {'ours':>9}")
    measured = [each for each in measured if each.entry in ("decode", "prefill")]
    for each in measured:
        shape = f"{each.rows} x {each.tokens}" if each.entry == "prefill" else f"{each.rows} rows"
        print(
            f"{each.entry:8} {each.model:14} {each.plan:10} {shape:10} {each.seconds * 1e3:7.2f}ms "
            f"{each.off(pricers, None):+9.1%} {each.off(pricers, own):+9.1%}  "
            f"{'fitted' if each.is_fitted else 'held out'}"
        )
    for is_fitted, kind in ((True, "fitted"), (False, "held out")):
        mine = [each for each in measured if each.is_fitted is is_fitted]
        for how, name in ((None, "the tables' speed"), (own, "ours")):
            off = [abs(each.off(pricers, how)) for each in mine]
            print(f"{kind}, at {name}: {sum(each <= 0.08 for each in off)} of {len(off)} within 8%, all {max(off):.1%}")
    print(own.to_json())
    if given.write:
        told = {
            "source": f"benchmarks/planning/{MEASURED.name}: steps on 1 {DEVICE}, torch 2.11",
            "made_by": "benchmarks/planning/own_steps.py",
            "devices": {f"{DEVICE.lower()}_sxm": own.to_json()},
        }
        OWN_STEPS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
