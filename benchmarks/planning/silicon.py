"""Predicted against measured: rows of three serving engines on H100 and H200, and the residuals that bars are made of.

    python -m benchmarks.planning.silicon FOLDER [--cache CACHE] [--cached] [--others ESTIMATES.json] [--write]

FOLDER: an unpacked wheel of aiconfigurator-core (Apache-2.0, NVIDIA), whose systems/silicon_sample.csv holds measured
times to the first token (TTFT) and between tokens (TPOT); `silicon_rows` says which rows are taken. Rows are means over
requests that come as others end: `partitioner.planning.pricing.continuous` says what that makes of a plan's steps.

Printed: mean absolute percentage errors with nothing fitted on rows; with one efficiency and one overhead per engine,
and whether its load came in one wave or in ten, fitted on one model of three (of two mixtures of experts), the others
held out; and regrets (`regret`). --others puts another predictor's times (`aiconfigurator_rows`) beside ours, on the
rows that it has. --cached keeps the rows whose prompts came from a cache. --write keeps the quantiles
of measured over predicted, of nothing fitted (partitioner/planning/tables).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.planning.regret import print_regrets
from benchmarks.planning.silicon_rows import DENSE, Row, read
from partitioner.planning.explain import RESIDUALS
from partitioner.planning.pricing.continuous import WAVES, Served


@dataclass(frozen=True)
class Engine:
    """See `Steps.served`."""

    efficiency: float = 1.0
    overhead_s: float = 0.0
    waves: float = WAVES

    def times(self, row: Row) -> Served:
        return row.steps.served(waves=self.waves, efficiency=self.efficiency, overhead_s=self.overhead_s)


UNFITTED = Engine()


def errors(row: Row, served: Served) -> tuple[float, float]:
    """Of ttft and tpot."""
    return abs(served.ttft_s / row.ttft - 1), abs(served.tpot_s / row.tpot - 1)


def fitted(rows: Sequence[Row]) -> Engine:
    """The least mean error of tpot; of engines with the same speed, that of ttft."""

    def off(engine: Engine, what: int) -> float:
        return statistics.fmean(errors(row, engine.times(row))[what] for row in rows)

    found = []
    for waves in (1.0, WAVES):
        best = min((Engine(each, 0.0, waves) for each in np.arange(0.6, 1.8, 0.05)), key=lambda each: off(each, 1))
        best = min(
            (Engine(best.efficiency, over, waves) for over in np.arange(0, 0.5, 0.02)), key=lambda each: off(each, 0)
        )
        found.append((off(best, 0) + off(best, 1), best))
    return min(found, key=lambda each: each[0])[1]


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
                numbers = f"efficiency {found.efficiency:.2f}, overhead {found.overhead_s * 1e3:.0f} ms"
                result = said(others, [found.times(row) for row in others])
                print(f"  {model:16} {engine:7} {numbers}, {found.waves:.0f} waves: {result}")
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
        "made_by": "benchmarks/planning/silicon.py",
        "rows": len(rows),
        "said": f"80% of {len(rows)} measured rows of vLLM, SGLang and TensorRT-LLM on H100 and H200 lay within",
        "measured_over_predicted": quantiles(rows),
    }
    RESIDUALS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, help="where summaries of models are kept; FOLDER by default")
    parser.add_argument("--cached", action="store_true", help="keep rows whose prompts came from a cache")
    parser.add_argument("--others", type=Path, help="estimates of another predictor")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    left: Counter[str] = Counter()
    rows = read(given.folder, given.cache or given.folder, left, cached=given.cached)
    print("mean absolute percentage error, nothing fitted on rows")
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[f"{row.model:16} {row.engine:7} {row.system}"].append(row)
    dense, sparse = ([row for row in rows if (row.model in DENSE) is kind] for kind in (True, False))
    named = [*sorted(groups.items()), ("dense", dense), ("mixtures of experts", sparse)]
    for name, mine in named:
        print(f"{name:32} {said(mine, [UNFITTED.times(row) for row in mine])}")
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
