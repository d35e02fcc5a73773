"""Predicted against measured: rows of three serving engines on H100 and H200, and the residuals that bars are made of.

    python -m benchmarks.planning.silicon FOLDER [--cache CACHE] [--doubted] [--others ESTIMATES.json] [--write]

FOLDER: an unpacked wheel of aiconfigurator-core (Apache-2.0, NVIDIA), whose systems/silicon_sample.csv holds measured
times to the first token (TTFT) and between tokens (TPOT); `rows` says which rows are taken, `loads` how
they came about; pyarrow reads its tables. Rows are means over requests that come as others end, which two designs
predict from the same priced steps: `partitioner.planning.pricing.batching` plays the engine's steps through,
`queue_formula` has a closed form.

Printed: mean absolute percentage errors of both with nothing fitted on rows; with one efficiency and one overhead per
engine (how slow its host code is: `Engine`), fitted on one model of three, the others held out; the same rows with one
overhead for all; what the errors of first tokens are made of; and regrets (`regret`). --others puts another predictor's
times (`aiconfigurator_rows`) beside ours, on the rows that it has. --doubted keeps the rows that are not what their
columns say. --write keeps the quantiles of measured over predicted, of nothing fitted (partitioner/planning/tables).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.planning.silicon.queue_formula import by_queues
from benchmarks.planning.silicon.regret import print_regrets
from benchmarks.planning.silicon.rows import DENSE, Row, read
from partitioner.planning.explain import RESIDUALS
from partitioner.planning.pricing.batching import FrontEnd, Served

EFFICIENCIES, OVERHEADS = (0.9, 1.0, 1.1, 1.2), (0.0, 0.5, 1.0)
"""What is tried for an engine. No more than the usual overhead: models whose rows hardly tell (Llama 70B) take more
where they may, and those that it holds up are then off by twice as much.
"""
TOKEN_S, REQUEST_S, LAUNCH_S = 60e-6, 4e-3, 20e-6
"""Of an engine's host code: to send a token, to take a request in, to launch a kernel of a step with prompts. Nobody
published these: they are round numbers near what all rows together are best predicted with.
"""


@dataclass(frozen=True)
class Engine:
    """efficiency: of kernels, over that of the tables. overhead: of its host code, over `TOKEN_S` and the others."""

    efficiency: float = 1.0
    overhead: float = 0.0

    def times(self, row: Row) -> Served:
        return _played(row, self)


@functools.lru_cache(maxsize=1 << 16)
def _played(row: Row, engine: Engine) -> Served:
    seconds = row.steps.seconds
    seconds = seconds.at_speed(engine.efficiency, engine.overhead * LAUNCH_S * seconds.kernels)
    front_end = FrontEnd(engine.overhead * TOKEN_S, engine.overhead * REQUEST_S)
    return replace(row.steps, seconds=seconds).served(row.scheduler, row.load, front_end)


UNFITTED, USUAL = Engine(), Engine(overhead=1.0)


def errors(row: Row, served: Served) -> tuple[float, float]:
    """Of ttft and tpot."""
    return abs(served.ttft_s / row.ttft - 1), abs(served.tpot_s / row.tpot - 1)


def fitted(rows: Sequence[Row]) -> Engine:
    """The least sum of both mean errors, over every third row. Of those within one standard error of it, the nearest to
    `USUAL`, for rows that hardly tell fits apart (Breiman et al., Classification and Regression Trees, 1984, 3.4.3).
    """
    sample = rows[:: 3 if len(rows) > 30 else 1]
    tried = itertools.starmap(Engine, itertools.product(EFFICIENCIES, OVERHEADS))
    off = {engine: [sum(errors(row, engine.times(row))) for row in sample] for engine in tried}
    least = min(off.values(), key=statistics.fmean)
    most = statistics.fmean(least) + (statistics.stdev(least) / len(least) ** 0.5 if len(least) > 1 else 0.0)
    good = [engine for engine, each in off.items() if statistics.fmean(each) <= most]
    return min(good, key=lambda one: (abs(one.overhead - 1) + abs(one.efficiency - 1), statistics.fmean(off[one])))


def said(rows: Sequence[Row], served: Sequence[Served]) -> str:
    both = [errors(row, each) for row, each in zip(rows, served, strict=True)]
    ttft, tpot = ([each[what] for each in both] for what in (0, 1))
    return (
        f"{len(rows):5}  TTFT {statistics.fmean(ttft):6.1%} (median {statistics.median(ttft):6.1%})"
        f"  TPOT {statistics.fmean(tpot):6.1%} (median {statistics.median(tpot):6.1%})"
    )


def print_held_out(rows: Sequence[Row], models: Sequence[str]) -> None:
    """Each model in turn is what engines are fitted on."""
    everything: list[tuple[Row, Served]] = []
    for model in models:
        held: list[tuple[Row, Served]] = []
        for engine in sorted({row.engine for row in rows}):
            mine = [row for row in rows if row.engine == engine]
            own, others = ([row for row in mine if (row.model == model) is kind] for kind in (True, False))
            if own and others:
                found = fitted(own)
                held += [(row, found.times(row)) for row in others]
                numbers = f"efficiency {found.efficiency:.2f}, overhead {found.overhead:.1f}"
                result = said(others, [found.times(row) for row in others])
                print(f"  {model:16} {engine:7} {numbers}: {result}")
        everything += held
    if everything:
        print(f"{'held out':32} {said(*zip(*everything, strict=True))}")


def print_beside(rows: Sequence[Row], path: Path) -> None:
    """Another predictor and ours, nothing fitted on rows, on the same rows."""
    told = json.loads(path.read_text(encoding="utf-8"))
    known = [row for row in rows if "tpot" in told.get(row.identity, {})]
    theirs = {row.identity: Served(told[row.identity]["ttft"], told[row.identity]["tpot"], row.batch) for row in known}
    print(f"of {len(rows)} rows, {len(known)} that the other predictor has")
    kinds = {
        "dense": [row for row in known if row.model in DENSE],
        "mixtures of experts": [row for row in known if row.model not in DENSE],
        "qwen3-32b on H100": [row for row in known if row.model == "qwen3-32b" and row.system == "H100"],
    }
    for name, mine in kinds.items():
        for who, served in (
            ("the other", [theirs[row.identity] for row in mine]),
            ("ours", [UNFITTED.times(row) for row in mine]),
        ):
            if mine:
                print(f"{name:22} {who:9} {said(mine, served)}")
                print_regrets(mine, served, title=f": {name}, {who}")


def print_first_tokens(rows: Sequence[Row]) -> None:
    """What the errors of first tokens are made of: by what holds requests up, each with what it says of the model."""

    def waits(row: Row) -> bool:
        return row.steps.slots < row.steps.requests

    def all_tokens_per_s(row: Row) -> float:
        return row.batch / row.tpot

    kinds: list[tuple[str, Callable[[Row], bool]]] = [
        ("requests wait for room in the cache, as predicted", waits),
        ("room, below 2000 tokens/s of all streams", lambda row: not waits(row) and all_tokens_per_s(row) < 2000),
        ("room, 2000 to 6000 tokens/s", lambda row: not waits(row) and 2000 <= all_tokens_per_s(row) < 6000),
        ("room, 6000 tokens/s and more", lambda row: not waits(row) and all_tokens_per_s(row) >= 6000),
    ]
    whole = sum(errors(row, UNFITTED.times(row))[0] for row in rows)
    for name, belongs in kinds:
        mine = [row for row in rows if belongs(row)]
        if not mine:
            continue
        off = [UNFITTED.times(row).ttft_s / row.ttft - 1 for row in mine]
        share = sum(map(abs, off)) / whole
        print(
            f"  {name:52} {len(mine):5} rows, {share:4.0%} of the error: mean {statistics.fmean(map(abs, off)):6.1%}, "
            f"median {statistics.median(map(abs, off)):6.1%}, signed {statistics.median(off):+6.1%}"
        )
    told = [row for row in rows if (row.model, row.engine) == ("llama-3.1-8b", "trtllm")]
    if told:
        fewer = [_fewer_slots(row) for row in told]
        print(
            "  Llama 3.1 8B on TensorRT-LLM, whose first tokens grow by 1 / (requests - 1) of the time to write a text:"
        )
        print(f"    a slot for each request       {said(told, [UNFITTED.times(row) for row in told])}")
        print(f"    one slot less than requests   {said(told, fewer)}")


def _fewer_slots(row: Row) -> Served:
    slots = max(1, min(row.steps.slots, row.steps.requests - 1))
    return replace(row.steps, slots=slots).served(row.scheduler, row.load)


def quantiles(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    served = [UNFITTED.times(row) for row in rows]
    ratios = {
        "ttft": [row.ttft / each.ttft_s for row, each in zip(rows, served, strict=True)],
        "tpot": [row.tpot / each.tpot_s for row, each in zip(rows, served, strict=True)],
    }
    return {
        what: {"10%": round(float(np.quantile(each, 0.1)), 3), "90%": round(float(np.quantile(each, 0.9)), 3)}
        for what, each in ratios.items()
    }


def write(rows: Sequence[Row]) -> None:
    told = {
        "source": "aiconfigurator-core 0.12.0 (Apache-2.0, NVIDIA), systems/silicon_sample.csv, H100 and H200, agg",
        "made_by": "benchmarks/planning/silicon",
        "rows": len(rows),
        "said": f"80% of {len(rows)} measured rows of vLLM, SGLang and TensorRT-LLM on H100 and H200 lay within",
        "measured_over_predicted": quantiles(rows),
    }
    RESIDUALS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, help="where summaries of models are kept; FOLDER by default")
    parser.add_argument("--doubted", action="store_true", help="keep rows that are not what their columns say")
    parser.add_argument("--others", type=Path, help="estimates of another predictor")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    left: Counter[str] = Counter()
    rows = read(given.folder, given.cache or given.folder, left, doubted=given.doubted)
    print("mean absolute percentage error, nothing fitted on rows")
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[f"{row.model:16} {row.engine:7} {row.system}"].append(row)
    dense, sparse = ([row for row in rows if (row.model in DENSE) is kind] for kind in (True, False))
    named = [*sorted(groups.items()), ("dense", dense), ("mixtures of experts", sparse)]
    for name, mine in named:
        print(f"{name:32} {said(mine, [UNFITTED.times(row) for row in mine])}")
    print("the same rows by a closed formula of queues")
    for name, mine in named[-2:]:
        print(f"{name:32} {said(mine, [by_queues(row.steps) for row in mine])}")
    told = f"{TOKEN_S * 1e6:.0f} us a token, {REQUEST_S * 1e3:.0f} ms a request, {LAUNCH_S * 1e6:.0f} us a kernel"
    print(f"the same rows with one overhead for all: {told}")
    for name, mine in named:
        print(f"{name:32} {said(mine, [USUAL.times(row) for row in mine])}")
    print("what the errors of first tokens are made of")
    for name, mine in named[-2:]:
        print(f" {name}")
        print_first_tokens(mine)
    print("fitted on one model, the others held out")
    print_held_out(dense, DENSE)
    print_held_out(sparse, sorted({row.model for row in sparse}))
    print_regrets(rows, [UNFITTED.times(row) for row in rows])
    if given.others:
        print_beside(rows, given.others)
    print("not priced:", ", ".join(f"{count} {why}" for why, count in left.most_common()))
    print("measured over predicted:", quantiles(rows))
    if given.write:
        write(rows)


if __name__ == "__main__":
    main()
