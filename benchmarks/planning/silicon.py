"""Predicted against measured: rows of three serving engines on H100 and H200, and the residuals that bars are made of.

    python -m benchmarks.planning.silicon FOLDER [--cache CACHE] [--write]

FOLDER: an unpacked wheel of aiconfigurator-core (Apache-2.0, NVIDIA), whose systems/silicon_sample.csv holds measured
times to the first token (TTFT) and between tokens (TPOT). Rows in formats that the product cannot run (fp4, int4), of
shapes that are not in `shapes`, and those whose prefill and decode are apart are counted, not priced.

These engines batch continuously, and the rows are means over requests that come as others end. So beside a step of b
rows, each token waits for its part of the prompts of others, and a first token for prompts before it:

    tpot = (decode(b) + share x (b - 1) / new x prefill(1)) / efficiency
    ttft = overhead + (prefill(1) x (1 + queue x (b - 1)) + decode(b)) / efficiency

Printed: mean absolute percentage errors with nothing fitted on rows (share 1, efficiency 1, queue 1/6, overhead 0); and
with these four fitted per engine on one dense model, the others held out, for engines differ in how they mix prompts
with tokens. --write keeps the quantiles of measured over predicted, of nothing fitted (partitioner/planning/tables).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.planning.models import SHAPES, summary_of
from partitioner.planning.cluster import Cluster
from partitioner.planning.explain import RESIDUALS
from partitioner.planning.pricing.price import Pricer
from partitioner.program.plan import Plan

MODELS = {
    "Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "Llama-3.1-70B": "llama-3.1-70b",
    "Qwen3-32B": "qwen3-32b",
    "Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "DeepSeek-R1": "deepseek-v3",
    "DeepSeek-V3": "deepseek-v3",
}
DENSE = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-32b")


@dataclass(frozen=True)
class Engine:
    """See the module's docstring."""

    share: float = 1.0
    efficiency: float = 1.0
    queue: float = 1 / 6
    overhead: float = 0.0


UNFITTED = Engine()


@dataclass(frozen=True)
class Row:
    """Seconds: decode step, prefill of one prompt; what was measured of ttft and tpot."""

    model: str
    engine: str
    system: str
    batch: int
    new: int
    decode: float
    prefill: float
    ttft: float
    tpot: float

    def predicted(self, engine: Engine) -> tuple[float, float]:
        """Of ttft and tpot."""
        others = self.batch - 1
        tpot = (self.decode + engine.share * others / self.new * self.prefill) / engine.efficiency
        first = (self.prefill * (1 + engine.queue * others) + self.decode) / engine.efficiency
        return engine.overhead + first, tpot


def read(folder: Path, cache: Path, left: Counter[str]) -> list[Row]:
    pricers: dict[tuple[str, str, str, int], Pricer] = {}
    found: list[Row] = []
    with next(folder.rglob("silicon_sample.csv")).open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            system = row["system"].partition("_")[0].upper()
            if system not in ("H100", "H200"):
                continue
            name = MODELS.get(row["model_path"].rpartition("/")[2])
            if row["mode"] != "agg":
                left["prefill and decode apart"] += 1
            elif row["precision"] in ("fp4", "int4"):
                left[f"format {row['precision']}"] += 1
            elif name is None or not (SHAPES / f"{name}.json").is_file():
                left[f"no shape: {row['model_path']}"] += 1
            elif not cache.joinpath(f"{name}.pickle").is_file() and cache != folder:
                left[f"not traced here: {name}"] += 1
            else:
                priced = price(row, name, system, cache, pricers)
                if isinstance(priced, str):
                    left[priced] += 1
                else:
                    found.append(priced)
    return found


def price(
    row: dict[str, str], name: str, system: str, cache: Path, pricers: dict[tuple[str, str, str, int], Pricer]
) -> Row | str:
    tp, dp = (max(1, int(row[name] or 1)) for name in ("tp_size", "attention_dp_size"))
    ep, etp = (max(1, int(row[name] or 1)) for name in ("moe_ep_size", "moe_tp_size"))
    if ep * etp > 1 and ep * etp != tp * dp:
        return "experts over other ranks than attention"
    plan = Plan(tp=tp, dp=dp, ep=ep, etp=etp if ep > 1 else 1)
    kind = "float8_e4m3fn" if row["precision"] == "fp8" else ""
    key = (name, system, kind, tp * dp)
    if key not in pricers:
        cluster = Cluster.parse(f"{tp * dp}x{system}")
        pricers[key] = Pricer(summary_of(name, cache), cluster, weight_dtype=kind)
    pricer = pricers[key]
    prompt, new, batch = int(row["isl"]), int(row["osl"]), int(row["batch_size"])
    layers = (pricer.summary.num_layers,)
    rows = max(1, batch if dp == 1 else batch // dp)
    decode = sum(s.total for s in pricer._stage_seconds(plan, "decode", rows, 1, prompt + new // 2, layers)[0])
    prefill = sum(s.total for s in pricer._stage_seconds(plan, "prefill", 1, prompt, 0, layers)[0])
    measured = float(row["silicon_ttft_ms"]) * 1e-3, float(row["silicon_tpot_ms"]) * 1e-3
    return Row(name, row["backend"], system, rows, new, decode, prefill, *measured)


def fitted(rows: list[Row]) -> Engine:
    """The least mean error of tpot, then that of ttft."""

    def off(engine: Engine, what: int) -> float:
        return statistics.fmean(abs(r.predicted(engine)[what] / (r.ttft, r.tpot)[what] - 1) for r in rows)

    grid = [Engine(share, efficiency) for share in np.arange(0, 1.25, 0.1) for efficiency in np.arange(0.6, 1.6, 0.05)]
    best = min(grid, key=lambda engine: off(engine, 1))
    queues = [0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8]
    more = [replace(best, queue=queue, overhead=over) for queue in queues for over in np.arange(0, 0.5, 0.025)]
    return min(more, key=lambda engine: off(engine, 0))


def said(rows: list[Row], predicted: list[tuple[float, float]]) -> str:
    ttft = statistics.fmean(abs(p[0] / row.ttft - 1) for row, p in zip(rows, predicted, strict=True))
    tpot = statistics.fmean(abs(p[1] / row.tpot - 1) for row, p in zip(rows, predicted, strict=True))
    return f"{len(rows):5}  TTFT {ttft:6.1%}  TPOT {tpot:6.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cache", type=Path, help="where summaries are kept; only those in it are used")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    left: Counter[str] = Counter()
    rows = read(given.folder, given.cache or given.folder, left)
    print("mean absolute percentage error, nothing fitted on rows")
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[f"{row.model:16} {row.engine:7} {row.system}"].append(row)
    for name, mine in sorted(groups.items()):
        print(f"{name:32} {said(mine, [row.predicted(UNFITTED) for row in mine])}")
    dense, sparse = ([row for row in rows if (row.model in DENSE) is kind] for kind in (True, False))
    for name, mine in (("dense", dense), ("mixtures of experts", sparse)):
        if mine:
            print(f"{name:32} {said(mine, [row.predicted(UNFITTED) for row in mine])}")
    print("share, efficiency, queue and overhead per engine, fitted on one dense model, the other dense ones held out")
    ratios: dict[str, list[float]] = {"ttft": [], "tpot": []}
    for model in DENSE:
        held: list[Row] = []
        predicted: list[tuple[float, float]] = []
        for engine in sorted({row.engine for row in dense}):
            mine = [row for row in dense if row.engine == engine and row.model == model]
            others = [row for row in dense if row.engine == engine and row.model != model]
            if mine and others:
                found = fitted(mine)
                held += others
                predicted += [row.predicted(found) for row in others]
                numbers = f"share {found.share:.1f}, efficiency {found.efficiency:.2f}, queue {found.queue:.2f}"
                print(f"  fitted on {model:14} {engine:7} {numbers}, overhead {found.overhead * 1e3:.0f} ms")
        if held:
            print(f"{'held out':32} {said(held, predicted)}")
    for row in rows:
        ttft, tpot = row.predicted(UNFITTED)
        ratios["ttft"].append(row.ttft / ttft)
        ratios["tpot"].append(row.tpot / tpot)
    print("not priced:", ", ".join(f"{count} {why}" for why, count in left.most_common()))
    quantiles = {
        what: {"10%": round(float(np.quantile(each, 0.1)), 3), "90%": round(float(np.quantile(each, 0.9)), 3)}
        for what, each in ratios.items()
    }
    print("measured over predicted:", quantiles)
    if given.write:
        told = {
            "source": "aiconfigurator-core 0.12.0 (Apache-2.0, NVIDIA), systems/silicon_sample.csv, H100 and H200, agg",
            "made_by": "benchmarks/planning/silicon.py",
            "rows": len(rows),
            "said": f"80% of {len(rows)} measured rows of vLLM, SGLang and TensorRT-LLM on H100 and H200 lay within",
            "measured_over_predicted": quantiles,
        }
        RESIDUALS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
