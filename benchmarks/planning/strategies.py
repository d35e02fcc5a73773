"""What each kind of parallelism does to latency and throughput, in numbers: the table of docs/parallelism/choosing.md.

    python -m benchmarks.planning.strategies             about two minutes, in which the models are traced
    python -m benchmarks.planning.strategies FOLDER      the same; summaries of models are kept there (`models.py`)

Two dense hosts of 8 H100 each, and a mixture of experts on 32 x 8: each strategy against the plan before it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.planning.models import summary_of
from partitioner.planning.cluster import Cluster
from partitioner.planning.explain import reason
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.search import search
from partitioner.program.plan import Plan

ROWS = (
    ("llama-3.1-70b", "16xH100", Workload(1024, 256, 16), ("tp=2", "tp=4", "tp=8", "tp=16", "tp=8,pp=2", "dp=2,tp=8")),
    ("llama-3.1-70b", "16xH100", Workload(1024, 256, 128), ("tp=8", "tp=8,pp=2", "dp=2,tp=8")),
    ("deepseek-v3", "32x8xH100", Workload(4096, 512, 512),
     ("tp=8,pp=4,dp=8", "tp=8,pp=4,ep=8,dp=8", "dp=32,tp=8,ep=32,etp=8", "dp=32,tp=8,ep=64", "dp=32,tp=8,ep=256")),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning.strategies")
    parser.add_argument("folder", type=Path, nargs="?", help="where summaries of models are kept")
    given = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        compare(given or Path(temporary))


def compare(folder: Path) -> None:
    """Prints a line for each plan of `ROWS`, and the best plans that the search finds for the last row's model."""
    for name, gpus, workload, texts in ROWS:
        pricer = Pricer(summary_of(name, folder), Cluster.parse(gpus))
        print(f"{name} on {gpus}: prompts of {workload.prompt}, {workload.new} new, batch {workload.batch}")
        for text in texts:
            found = pricer.price(Plan.parse(text), workload)
            if found.refused or found.decode is None:
                print(f"  {text:24} refused: {found.refused}")
                continue
            most = max(found.decode.by_collective.items(), key=lambda each: each[1], default=("none", 0.0))
            print(
                f"  {text:24} ttft {found.ttft_s * 1e3:7.0f} ms  tpot {found.tpot_s * 1e3:6.2f} ms "
                f"{found.tokens_per_s:7.0f} tok/s  {found.memory.total / 1e9:5.1f} GB  binds: {found.decode.binds}; "
                f"{most[0]} {most[1] * 1e3:.2f} ms of a token"
            )
    name, gpus, workload, _ = ROWS[-1]
    summary, cluster = summary_of(name, folder), Cluster.parse(gpus)
    start, cpu = time.perf_counter(), time.process_time()
    choice = search(summary, cluster, workload, goal="throughput", frontier=False)
    spent = time.process_time() - cpu
    print(f"search of {len(choice.ranked) + len(choice.refused)} plans: {spent:.1f} s of one core", end="")
    print(f", {time.perf_counter() - start:.1f} s by the clock")
    for price in choice.ranked[:3]:
        print(f"  {price.plan}: {reason(price, cluster, summary)}")


if __name__ == "__main__":
    main()
