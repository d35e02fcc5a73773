"""Fits how much of the roofline kernels reach, and says how far off the fitted grids are on all rows of the tables.

    python -m benchmarks.planning.fit_kernels FOLDER [--write]

FOLDER: an unpacked wheel of aiconfigurator-core (Apache-2.0, NVIDIA): systems/data/*/{gemm,attention,mla,moe} tables
of three engines, of which the fastest counts; of attention, heads of 128 in groups of 2 to 16, and over latents. Needs
pyarrow. Each kind of kernel has a grid of shares, at logarithms of sizes; a point is the median of the rows near it.
--write puts them into partitioner/planning/tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from partitioner.planning.cluster import device
from partitioner.planning.kernels import EXPANDING, FITTED, Grid, Kernels

DEVICES = ("a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "l40s")
DTYPES = {"bfloat16": "bfloat16", "fp8": "float8_e4m3fn", "int4_wo": EXPANDING}
ITEM = {"bfloat16": 2, "float8_e4m3fn": 1, EXPANDING: 0.5}
"""Bytes of a weight; of what it is multiplied with, too, but where codes are expanded inside the kernel."""
LINEAR = ([0, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [8, 10, 11, 12, 13, 14, 16], [8, 10, 11, 12, 13, 14, 16])
PREFILL = ([4, 6, 8, 9, 10, 11, 12, 13, 14], [0, 2, 3, 4, 5, 6, 7, 8, 10, 12])
DECODE = ([4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12])
LATENT = ([4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 17], [0, 2, 3, 4, 5, 6, 7, 8, 9, 10], [0, 2, 3, 4, 5, 6, 7])
LATENT_WIDTH, CARRIED, HEAD = 512, 64, 128 + 128
"""Of the models whose attention over latents was measured: a latent, what is carried beside it, keys and values."""
EXPERTS = ([-7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10], [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14])

Rows = list[tuple[tuple[float, ...], float]]
"""sizes, and the share of the roofline that was reached"""


def tables(folder: Path, name: str, kind: str, file: str) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.rglob(f"systems/data/{name}/{kind}/*/*/{file}")):
        yield from pq.read_table(path).to_pylist()


def linear(folder: Path, name: str, at: Kernels, dtype: str) -> Rows:
    best: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for row in tables(folder, name, "gemm", "gemm_perf.parquet"):
        if DTYPES.get(row["gemm_dtype"]) == dtype:
            best[row["m"], row["n"], row["k"]].append(row["latency"] * 1e-3)
    found: Rows = []
    for (m, n, k), seconds in best.items():
        size = ITEM[dtype] * n * k + (2 if dtype == EXPANDING else ITEM[dtype]) * m * k + 2 * m * n
        found.append(((m, n, k), at.roofline(2 * m * n * k, size, dtype) / min(seconds)))
    return found


def attention(folder: Path, name: str, at: Kernels, *, decode: bool) -> Rows:
    file = f"{'generation' if decode else 'context'}_attention_perf.parquet"
    best: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for row in tables(folder, name, "attention", file):
        grouped = 2 <= row["num_heads"] / (row["num_key_value_heads"] or row["num_heads"]) <= 16
        plain = not row.get("window_size") and row["head_dim"] == 128 and grouped
        if plain and row["attn_dtype"] == "bfloat16" == row["kv_cache_dtype"]:
            length = row["step"] + 1 if decode else row["isl"]
            kv = row["num_key_value_heads"] or row["num_heads"]
            key = (row["batch_size"], length, row["num_heads"], kv, row["head_dim"])
            best[key].append(row["latency"] * 1e-3)
    found: Rows = []
    for (batch, length, heads, kv, width), seconds in best.items():
        queries = 1 if decode else length
        pairs = length if decode else length * (length + 1) / 2
        flops = 4 * batch * heads * width * pairs
        size = 2 * batch * width * (2 * queries * heads + 2 * length * kv)
        share = at.roofline(flops, size, "bfloat16") / min(seconds)
        found.append(((length, batch * (kv if decode else heads)), share))
    return found


def latent(folder: Path, name: str, at: Kernels) -> Rows:
    """Of a token, with the products that take queries to latents and latents to values; as `products.latent_products`
    counts them.
    """
    taken: dict[tuple[int, int], list[float]] = defaultdict(list)
    for op in ("mla_gen_pre", "mla_gen_post"):
        best: dict[tuple[int, int], float] = {}
        for row in tables(folder, name, "mla_bmm", "mla_bmm_perf.parquet"):
            if row["op_name"] == op and row["bmm_dtype"] == "bfloat16":
                key = (row["num_tokens"], row["num_heads"])
                best[key] = min(row["latency"] * 1e-3, best.get(key, 1.0))
        for key, seconds in best.items():
            taken[key].append(seconds)
    best_of: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for row in tables(folder, name, "mla", "generation_mla_perf.parquet"):
        if row["mla_dtype"] == "bfloat16" == row["kv_cache_dtype"]:
            best_of[row["batch_size"], row["isl"] + row["step"], row["num_heads"]].append(row["latency"] * 1e-3)
    found: Rows = []
    for (batch, length, heads), attending in best_of.items():
        around = taken.get((batch, heads), [])
        if len(around) == 2:
            made = LATENT_WIDTH * HEAD
            flops = 2 * batch * heads * (made + length * (2 * LATENT_WIDTH + CARRIED))
            size = 2 * (batch * length * (LATENT_WIDTH + CARRIED) + heads * made + batch * heads * (HEAD + CARRIED))
            share = at.roofline(flops, size, "bfloat16") / (min(attending) + sum(around))
            found.append(((length, batch, heads), share))
    return found


def experts(folder: Path, name: str, at: Kernels, dtype: str) -> Rows:
    """Routing as skewed as in the tables' power law; experts met are those of an even one."""
    best: dict[tuple[int, ...], list[float]] = defaultdict(list)
    keys = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    for row in tables(folder, name, "moe", "moe_perf.parquet"):
        if DTYPES.get(row["moe_dtype"].removesuffix("_block")) == dtype and row["distribution"] == "power_law_1.01":
            best[tuple(row[key] for key in keys)].append(row["latency"] * 1e-3)
    found: Rows = []
    for (tokens, hidden, inter, topk, count, tp, ep), seconds in best.items():
        held, columns, rows = count / ep, inter / tp, tokens * topk / ep
        met = held * (1 - (1 - topk / count) ** tokens)
        size = ITEM[dtype] * 3 * met * hidden * columns + 2 * rows * (2 * hidden + 3 * columns)
        light = at.roofline(6 * rows * hidden * columns, size, dtype)
        found.append(((rows / held, light * 1e6), light / min(seconds)))
    return found


def fit(rows: Rows, axes: Sequence[Sequence[float]]) -> Grid:
    """Medians of the rows nearest to each point; points without rows have what the nearest ones have."""
    points = [np.array(axis, dtype=float) for axis in axes]
    near: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for sizes, share in rows:
        logs = [np.log2(max(size, 1e-9)) for size in sizes]
        at = tuple(int(np.argmin(np.abs(axis - x))) for axis, x in zip(points, logs, strict=True))
        if all(abs(axis[i] - x) <= 0.51 for axis, i, x in zip(points, at, logs, strict=True)):
            near[at].append(share)
    known = {at: statistics.median(shares) for at, shares in near.items()}
    values = np.empty([len(axis) for axis in points])
    for at in np.ndindex(values.shape):
        values[at] = known[min(known, key=lambda other: sum((a - b) ** 2 for a, b in zip(at, other, strict=True)))]
    return Grid(tuple(map(tuple, axes)), np.vectorize(lambda value: float(f"{value:.3g}"))(values).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--dtypes", default=",".join(DTYPES.values()), help="with commas; others keep what was written")
    parser.add_argument("--kinds", default="prefill,decode,latent,linear,experts", help="with commas; others are kept")
    parser.add_argument("--devices", default=",".join(DEVICES), help="with commas; others keep what was written")
    given = parser.parse_args()
    devices: dict[str, dict[str, dict[str, Any]]] = (
        json.loads(FITTED.read_text())["devices"] if FITTED.is_file() else {}
    )
    print(f"{'device':10} {'kernel':9} {'dtype':14} {'rows':>6}  seconds from the grid: median error, 95%, within 20%")
    for name in given.devices.split(","):
        spec = device(name.partition("_")[0])
        at = Kernels(name, spec.bytes_per_s, spec.flops_per_s, {})
        kinds: list[tuple[str, str, Rows, Sequence[Sequence[float]]]] = []
        if "bfloat16" in given.dtypes.split(","):
            kinds.append(("prefill", "bfloat16", attention(given.folder, name, at, decode=False), PREFILL))
            kinds.append(("decode", "bfloat16", attention(given.folder, name, at, decode=True), DECODE))
            kinds.append(("latent", "bfloat16", latent(given.folder, name, at), LATENT))
        for dtype in given.dtypes.split(","):
            kinds.append(("linear", dtype, linear(given.folder, name, at, dtype), LINEAR))
            kinds.append(("experts", dtype, experts(given.folder, name, at, dtype), EXPERTS))
        for kind, dtype, rows, axes in kinds:
            if kind not in given.kinds.split(","):
                continue
            if len(rows) < 50:
                print(f"{name:10} {kind:9} {dtype:14} {len(rows):6}  too few rows: no grid")
                continue
            grid = fit(rows, axes)
            off = sorted(abs(share / grid.at(*sizes) - 1) for sizes, share in rows)
            within = sum(each <= 0.2 for each in off) / len(off)
            middle, most = statistics.median(off), off[int(0.95 * len(off))]
            print(f"{name:10} {kind:9} {dtype:14} {len(rows):6}  {middle:6.1%} {most:7.1%} {within:7.1%}", flush=True)
            devices.setdefault(name, {}).setdefault(kind, {})[dtype] = {"axes": grid.axes, "values": grid.values}
    if given.write:
        source = (
            "aiconfigurator-core 0.12.0 (Apache-2.0, NVIDIA), systems/data/*/{gemm,attention,mla,moe}/*/*/*.parquet"
        )
        text = json.dumps({"source": source, "made_by": "benchmarks/planning/fit_kernels.py", "devices": devices},
                          separators=(",", ":"))  # fmt: skip
        FITTED.write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")
        print(f"written: {FITTED}, {FITTED.stat().st_size} bytes")


if __name__ == "__main__":
    main()
