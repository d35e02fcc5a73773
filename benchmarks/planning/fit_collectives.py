"""Fits the seconds of NCCL's collectives, and says how far off they are, beside torch's estimator.

    python -m benchmarks.planning.fit_collectives FOLDER [--write]

FOLDER: an unpacked wheel of aiconfigurator-core (Apache-2.0, NVIDIA), whose systems/data/*/comm/nccl tables hold the
seconds of all_reduce, all_gather, reduce_scatter and all_to_all on 2, 4 and 8 GPUs, 256 B to 1 GiB. Needs pyarrow.
Engines' own all-reduces (comm/*/custom_allreduce tables, in captured graphs) are fitted apart: of each size the median
of all engines and versions.
Per system, collective and number of GPUs: alpha and beta on three ranges of sizes. The ranges are those with the least
squared relative error. --write puts them into partitioner/planning/tables. Printed: errors on the rows that
were fitted, on rows of other sizes (every second size held out), and of torch._inductor.comm_analysis.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch._inductor import comm_analysis

from partitioner.planning.collectives import DIRECT, FITTED, Curve, FittedLinks

KINDS = {"alltoall": "all_to_all"}
ITEM = {"half": 2, "int8": 1}
SMALLEST, LARGEST = 256, 1 << 30
Rows = list[tuple[str, int, int, float]]
"""collective, GPUs, bytes, seconds"""


def read(folder: Path) -> dict[str, Rows]:
    found: dict[str, Rows] = defaultdict(list)
    for path in sorted(folder.rglob("comm/nccl/*/nccl_perf.parquet")):
        system = path.parents[3].name
        for row in pq.read_table(path).to_pylist():
            size = row["message_size"] * ITEM[row["nccl_dtype"]]  # tables count elements
            if SMALLEST <= size <= LARGEST and 2 <= row["num_gpus"] <= 8:
                kind = KINDS.get(row["op_name"], row["op_name"])
                found[system].append((kind, row["num_gpus"], size, row["latency"] * 1e-3))
    return found


def read_direct(folder: Path) -> dict[str, Rows]:
    """Of the systems that have NCCL tables too."""
    found: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.rglob("comm/*/*/custom_allreduce_perf.parquet")):
        for row in pq.read_table(path).to_pylist():
            size = row["message_size"] * 2  # elements of bfloat16
            if "eager" not in row["kernel_source"] and SMALLEST <= size <= LARGEST and 2 <= row["num_gpus"] <= 8:
                found[path.parents[3].name][row["num_gpus"], size].append(row["latency"] * 1e-3)
    return {
        system: [(DIRECT, n, size, statistics.median(times)) for (n, size), times in sorted(by.items())]
        for system, by in found.items()
    }


def line(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float, float]:
    """Alpha and beta with the least squared relative error, neither below 0, and that error."""
    weighted = np.stack([1 / seconds, sizes / seconds], axis=1)
    best, *_ = np.linalg.lstsq(weighted, np.ones(len(sizes)), rcond=None)
    if best[1] < 0:
        best = np.array([1 / np.mean(1 / seconds), 0.0])
    elif best[0] < 0:
        best = np.array([0.0, 1 / np.mean(sizes / seconds)])
    return float(best[0]), float(best[1]), float(np.sum((weighted @ best - 1) ** 2))


def fit(rows: list[tuple[int, float]]) -> Curve:
    sizes = sorted({size for size, _ in rows})
    x, y = (np.array(each, dtype=float) for each in zip(*rows, strict=True))
    pieces: dict[tuple[int, int], Any] = {}
    for i, j in itertools.combinations(range(len(sizes) + 1), 2):
        inside = (x >= sizes[i]) & (x <= sizes[j - 1])
        if j - i >= 2:
            pieces[i, j] = line(x[inside], y[inside])
    count = len(sizes)
    cuts = min(
        (c for c in itertools.combinations(range(2, count - 1), 2) if c[1] - c[0] >= 2),
        key=lambda c: sum(pieces[span][2] for span in ((0, c[0]), (c[0], c[1]), (c[1], count))),
    )
    spans = ((0, cuts[0]), (cuts[0], cuts[1]), (cuts[1], count))
    return Curve(tuple((float(sizes[j - 1]), *pieces[i, j][:2]) for i, j in spans))


def fit_system(name: str, rows: Rows) -> FittedLinks:
    by: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    for kind, n, size, seconds in rows:
        by[kind, n].append((size, seconds))
    return FittedLinks(name, {key: fit(mine) for key, mine in by.items()})


def errors(links: FittedLinks, rows: Rows) -> list[float]:
    found = []
    for kind, n, size, seconds in rows:
        predicted = links.seconds(kind, n, size)
        assert predicted is not None
        found.append(abs(predicted / seconds - 1))
    return found


GENERATIONS = {"a100": "AMPERE", "l40s": "AMPERE", "h100": "HOPPER", "h200": "HOPPER"}
COLLECTIVES = {"all_reduce": "ALL_REDUCE", "all_gather": "ALL_GATHER", "reduce_scatter": "REDUCE_SCATTER"}


def torch_errors(system: str, rows: Rows) -> list[float]:
    """Of torch, which has no all-to-all of its own formula for every version: those are left out."""
    kind = comm_analysis.NVIDIA_GPU_TYPE[GENERATIONS.get(system.partition("_")[0], "BLACKWELL")]
    comm_analysis.get_gpu_type = lambda: kind  # type: ignore[assignment]
    found = []
    for collective, n, size, seconds in rows:
        if collective in COLLECTIVES:
            # torch takes what a rank brings
            brought = size // n if collective == "all_gather" else size
            coll = comm_analysis.NCCL_COLL[COLLECTIVES[collective]]
            estimate = comm_analysis.estimate_nccl_collective_runtime_impl(brought, n, coll)
            found.append(abs(estimate * 1e-3 / seconds - 1))
    return found


def said(found: list[float]) -> str:
    ordered = sorted(found)
    return f"{statistics.median(ordered):7.1%} {ordered[int(0.95 * len(ordered))]:8.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    tables = read(given.folder)
    print(f"{'system':22} {'rows':>6}   fitted: median, 95%    held out sizes        torch's estimator")
    everything: list[list[float]] = [[], [], []]
    fitted = {}
    for system, rows in tables.items():
        links = fitted[system] = fit_system(system, rows)
        order = {size: i for i, size in enumerate(sorted({row[2] for row in rows}))}
        kept = [row for row in rows if order[row[2]] % 2 == 0 or row[2] in (min(order), max(order))]
        held = [row for row in rows if row not in kept]
        found = [errors(links, rows), errors(fit_system(system, kept), held), torch_errors(system, rows)]
        for all_of_it, mine in zip(everything, found, strict=True):
            all_of_it += mine
        print(f"{system:22} {len(rows):6}   {said(found[0])}    {said(found[1])}    {said(found[2])}")
    print(f"{'all':22} {len(everything[0]):6}   " + "    ".join(map(said, everything)))
    off: list[float] = []
    for system, rows in read_direct(given.folder).items():
        if system in fitted:
            direct = fit_system(system, rows)
            off += errors(direct, rows)
            fitted[system] = FittedLinks(system, {**fitted[system].curves, **direct.curves})
    print(f"{'direct all-reduces':22} {len(off):6}   {said(off)}")
    if given.write:
        write(fitted)


def write(fitted: dict[str, FittedLinks]) -> None:
    systems: dict[str, dict[str, dict[str, Any]]] = {}
    for system, links in sorted(fitted.items()):
        for (kind, n), curve in sorted(links.curves.items()):
            rounded = [[upto, float(f"{a * 1e6:.4g}"), float(f"{b * 1e12:.4g}")] for upto, a, b in curve.segments]
            systems.setdefault(system, {}).setdefault(kind, {})[str(n)] = rounded
    source = (
        "aiconfigurator-core 0.12.0 (Apache-2.0, NVIDIA), systems/data/*/comm/*/*/{nccl,custom_allreduce}_perf.parquet"
    )
    unit = "per range of sizes: up to bytes, alpha in us, beta in ps per byte"
    text = json.dumps({"source": source, "made_by": "benchmarks/planning/fit_collectives.py", "unit": unit,
                       "systems": systems})  # fmt: skip
    FITTED.write_text(text.replace('}, "', '},\n "') + "\n", encoding="utf-8")
    print(f"written: {FITTED}, {FITTED.stat().st_size} bytes")


if __name__ == "__main__":
    main()
