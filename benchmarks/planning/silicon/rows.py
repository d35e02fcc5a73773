"""Measured rows of three serving engines on H100 and H200, each with the steps that its plan is priced at.

Left out, and counted: rows in formats that the product cannot run (fp4, int4), shapes that are not in `shapes`, prefill
and decode apart, rows that stand there several times, and four kinds that are not what their columns say:

    degrees     rows of more GPUs than a host has, where the same measured times stand with fewer, or whose identity
                names another tp (one source's columns have tp x ep where its identities have tp)
    cached      the rows of a source with one that computed above 70% of the device's peak products, had it computed
                its prompts (the others reach 50% at most): they came from a cache of prefixes
    light       rows of dense models whose tokens took less than the data sheet's memory needs to read the weights and
                the caches once, half of the new tokens written: two rows, by 11% and 17%; the next one has 7% to spare
    drafted     TensorRT-LLM's rows of DeepSeek, measured on the day after its multi-token prediction came in
                (`DRAFTED`): a step writes up to four tokens. The same version takes 1.2 to 1.9 times as long in the
                rows measured before that

The column of the batch is that of a rank of attention's dp: all rows with dp name dp times as many requests at a time.
"""

from __future__ import annotations

import csv
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.planning.models import SHAPES, summary_of
from benchmarks.planning.silicon.engine_kernels import ContiguousExperts, TableExperts, expert_times
from benchmarks.planning.silicon.loads import (
    cache_dtype_of,
    degrees_of,
    load_of,
    pads_experts,
    requests_of,
    scheduler_of,
)
from partitioner.planning.cluster import Cluster
from partitioner.planning.kernels import Kernels
from partitioner.planning.pricing.batching import Load, Scheduler
from partitioner.planning.pricing.continuous import SharedSteps, shared_steps
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.pricing.stored_format import StoredFormat
from partitioner.planning.quantities import Workload
from partitioner.program.plan import Plan

__all__ = ["DENSE", "Row", "read"]

MODELS = {
    "Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "Llama-3.1-70B": "llama-3.1-70b",
    "Qwen3-32B": "qwen3-32b",
    "Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "DeepSeek-R1": "deepseek-v3",
    "DeepSeek-V3": "deepseek-v3",
    "MiniMax-M2.5": "minimax-m2.5",
}
DENSE = ("llama-3.1-8b", "llama-3.1-70b", "qwen3-32b")
MOST_OF_PEAK, HOST = 0.7, 8
BLOCKWISE = "fp8_block"
"""How the mixtures' checkpoints in float8 are scaled."""
DRAFTED = "measured=2026-01-14"
"""github.com/SemiAnalysisAI/InferenceX, pull requests 392 and 412 of 2026-01-12: dsr1-fp8-h200-trt-mtp."""


@dataclass(frozen=True, eq=False)
class Row:
    """What was measured, in seconds, and what it is priced at. batch: requests at a time."""

    identity: str
    model: str
    engine: str
    system: str
    precision: str
    source: str
    plan: Plan
    prompt: int
    new: int
    batch: int
    ttft: float
    tpot: float
    steps: SharedSteps
    scheduler: Scheduler
    load: Load
    of_peak: float
    of_memory: float
    named_tp: int
    drafted: bool

    @property
    def gpus(self) -> int:
        return self.plan.mesh.world_size

    @property
    def tokens_per_s(self) -> float:
        """Per GPU."""
        return self.batch / self.tpot / self.gpus

    @property
    def group(self) -> tuple[str, str, str, str, int, int]:
        """Rows that differ in their plan and batch only."""
        return self.model, self.engine, self.system, self.precision, self.prompt, self.new


def read(folder: Path, cache: Path, left: Counter[str], *, doubted: bool = False) -> list[Row]:
    """folder: an unpacked wheel; cache: of summaries. left: counts what is not priced. doubted: keep the rows that are
    not what their columns say.
    """
    pricers: dict[tuple[str, ...], Pricer] = {}
    found: dict[tuple[object, ...], Row] = {}
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
            else:
                priced = _price(row, name, system, folder, cache, pricers)
                if isinstance(priced, str):
                    left[priced] += 1
                    continue
                key = (*priced.group, priced.plan, priced.batch, priced.ttft, priced.tpot)
                left["twice"] += key in found
                found[key] = priced
    return list(found.values()) if doubted else list(_without(found.values(), left))


def _price(
    row: dict[str, str], name: str, system: str, folder: Path, cache: Path, pricers: dict[tuple[str, ...], Pricer]
) -> Row | str:
    tp, dp, ep, etp = degrees_of(row)
    if ep * etp > 1 and ep * etp != tp * dp:
        return "experts over other ranks than attention"
    plan = Plan(tp=tp, dp=dp, ep=ep, etp=etp if ep > 1 else 1)
    kind, engine = "float8_e4m3fn" if row["precision"] == "fp8" else "", row["backend"]
    kept = cache_dtype_of(row, system)
    contiguous = pads_experts(row)
    key = (name, system, kind, kept or "", str(plan), engine, str(contiguous))
    if key not in pricers:
        summary = summary_of(name, cache)
        stored = StoredFormat.float8(summary.dtype) if kind else None
        cluster = Cluster.parse(f"{tp * dp}x{system}")
        kernels: Callable[[Kernels], Kernels] | None = ContiguousExperts.of if contiguous else None
        if summary.experts is not None and not contiguous:
            times = expert_times(folder, f"{system.lower()}_sxm", engine, BLOCKWISE if kind else summary.dtype)
            sizes = plan.etp if plan.ep > 1 else plan.tp, summary.experts.chosen, summary.experts.count, plan.ep
            kernels = functools.partial(TableExperts.of, times=times, sizes=sizes)
        pricers[key] = Pricer(summary, cluster, stored=stored, cache_dtype=kept, own=False, kernels=kernels)
    pricer = pricers[key]
    prompt, new, batch = int(row["isl"]), int(row["osl"]), requests_of(row)
    ttft, tpot = float(row["silicon_ttft_ms"]) * 1e-3, float(row["silicon_tpot_ms"]) * 1e-3
    steps = shared_steps(pricer, plan, Workload(prompt, new, batch))
    flops = pricer.prompt_flops(plan, prompt) * batch / dp / (ttft + new * tpot)
    peak = pricer.kernels.rate(kind or pricer.summary.dtype)
    of_memory = 0.0
    if name in DENSE:
        held = Workload(prompt, max(1, new // 2), min(batch, steps.slots * steps.worlds))
        read = pricer.memory(plan, held, pricer.even_stages(plan))
        of_memory = (read.weights + read.cache) / pricer.kernels.bytes_per_s / tpot
    source = row["silicon_data_source"].partition(";")[0]
    return Row(
        row["id"],
        name,
        engine,
        system,
        row["precision"],
        source,
        plan,
        prompt,
        new,
        batch,
        ttft,
        tpot,
        steps,
        scheduler_of(row),
        load_of(row),
        flops / peak,
        of_memory,
        _named_tp(row, tp * dp),
        DRAFTED in row["silicon_data_source"] and engine == "trtllm" and name == "deepseek-v3",
    )


def _named_tp(row: dict[str, str], ranks: int) -> int:
    """Ranks of attention that a row's identity names, those of dp among them; those of its columns, if none."""
    found = re.search(r"_tp(\d+)_", row["id"])
    return int(found[1]) if found else ranks


def _without(rows: Iterable[Row], left: Counter[str]) -> Iterable[Row]:
    rows = list(rows)
    gpus: dict[tuple[object, ...], set[int]] = defaultdict(set)
    for row in rows:
        gpus[row.model, row.engine, row.prompt, row.new, row.ttft, row.tpot].add(row.gpus)
    doubted = set()
    for (model, engine, *_), counts in gpus.items():
        doubted |= {(model, engine, count) for count in counts if count > HOST and min(counts) < count}
    impossible = {(row.source, row.model) for row in rows if row.of_peak > MOST_OF_PEAK}
    for row in rows:
        if (row.model, row.engine, row.gpus) in doubted or (row.gpus > HOST and row.named_tp != row.gpus):
            left[f"degrees in doubt ({row.gpus} GPUs)"] += 1
        elif (row.source, row.model) in impossible:
            left["prompts from a cache"] += 1
        elif row.of_memory > 1:
            left["faster than memory"] += 1
        elif row.drafted:
            left["tokens drafted"] += 1
        else:
            yield row
