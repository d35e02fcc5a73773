"""Predicted against measured: rows of three serving engines on H100 and H200, and the residuals that bars are made of.

    python -m benchmarks.planning.silicon FOLDER [--cache CACHE] [--write]

FOLDER: an unpacked wheel of aiconfigurator-core (Apache-2.0, NVIDIA), whose systems/silicon_sample.csv holds measured
times to the first token (TTFT) and between tokens (TPOT). Rows in formats that the product cannot run (fp4, int4), of
shapes that are not in `shapes`, and those whose prefill and decode are apart are counted, not priced.

These engines batch continuously, and the rows are means over requests that come as others end. So beside a step of b
rows, each token waits for its part of the prompts of others, and a first token for the prompts before it:

    tpot = decode(b) + (b - 1) / new x prefill(1)
    ttft = prefill(1) x (1 + queue x (b - 1)) + decode(b)          queue: a sixth, the mean of few bursts

Printed: mean absolute percentage errors with nothing fitted on rows, and with one overhead and one efficiency per engine
fitted on one model and the others held out. --write keeps the residuals' quantiles (partitioner/planning).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.planning.models import SHAPES, summary_of
from partitioner.planning.cluster import Cluster
from partitioner.planning.explain import RESIDUALS
from partitioner.planning.price import Pricer
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
QUEUE = 1 / 6


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

    def predicted(self, overhead: float = 0.0, efficiency: float = 1.0) -> tuple[float, float]:
        decode, prefill = self.decode / efficiency + overhead, self.prefill / efficiency + overhead
        tpot = decode + (self.batch - 1) / self.new * prefill
        return prefill * (1 + QUEUE * (self.batch - 1)) + decode, tpot


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


def fitted(rows: list[Row]) -> tuple[float, float]:
    """One overhead and one efficiency, with the least mean error of tpot."""
    best = (float("inf"), 0.0, 1.0)
    for efficiency in np.arange(0.4, 1.6, 0.05):
        for overhead in np.arange(0.0, 0.006, 0.0005):
            off = statistics.fmean(abs(row.predicted(overhead, efficiency)[1] / row.tpot - 1) for row in rows)
            best = min(best, (off, float(overhead), float(efficiency)))
    return best[1], best[2]


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
        print(f"{name:32} {said(mine, [row.predicted() for row in mine])}")
    dense, sparse = ([row for row in rows if (row.model in DENSE) is kind] for kind in (True, False))
    for name, mine in (("dense", dense), ("mixtures of experts", sparse)):
        if mine:
            print(f"{name:32} {said(mine, [row.predicted() for row in mine])}")
    print("one overhead and one efficiency per engine, fitted on one model, the others held out")
    ratios: dict[str, list[float]] = {"ttft": [], "tpot": []}
    for model in DENSE:
        held: list[Row] = []
        predicted: list[tuple[float, float]] = []
        for engine in sorted({row.engine for row in dense}):
            mine = [row for row in dense if row.engine == engine and row.model == model]
            others = [row for row in dense if row.engine == engine and row.model != model]
            if mine and others:
                overhead, efficiency = fitted(mine)
                held += others
                predicted += [row.predicted(overhead, efficiency) for row in others]
                print(f"  fitted on {model:14} {engine:7} overhead {overhead * 1e3:.1f} ms, efficiency {efficiency:.2f}")
        if held:
            print(f"{'held out':32} {said(held, predicted)}")
    for row in rows:
        ttft, tpot = row.predicted()
        ratios["ttft"].append(row.ttft / ttft)
        ratios["tpot"].append(row.tpot / tpot)
    print("not priced:", ", ".join(f"{count} {why}" for why, count in left.most_common()))
    quantiles = {
        what: {"10%": round(float(np.quantile(found, 0.1)), 3), "90%": round(float(np.quantile(found, 0.9)), 3)}
        for what, found in ratios.items()
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
