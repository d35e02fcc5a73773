"""all_reduce between processes of one host: through shared memory, and over gloo.

    shared memory    runtime/communication/shared_memory/shared_memory.py, as an engine's collectives use it
    gloo             torch.distributed.all_reduce in place

float32 on CPU, one thread per process; both take turns in the same processes, and the sums are compared. Printed are
the medians on rank 0 and their ratio, shared memory / gloo: below 1 shared memory is faster. In brackets are the
quartiles of that ratio within a round, then the ratio of the fastest rounds. A turn is many operations, where they are
short, so that the meeting before it does not count.

    python -m benchmarks.shared_memory               half a minute
    python -m benchmarks.shared_memory --ranks 4
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import distributed as dist

from benchmarks.support.peers import of_best
from benchmarks.support.ranks import launch_ranks
from benchmarks.support.rounds import Ratio, take_turns
from partitioner.cli.common.tables import print_table
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.ops.collectives import all_reduce
from runtime.processes.launch import begin_worker

OURS, GLOO = "shared memory", "gloo"
SIZES = {"4 KB": 1 << 12, "64 KB": 1 << 16, "1 MB": 1 << 20, "8 MB": 1 << 23}
TURN_BYTES, MOST = 1 << 22, 30

console = Console(width=None if sys.stdout.isatty() else 110)


def repeats(size: int) -> int:
    return max(1, min(MOST, TURN_BYTES // size))


def again(operation: Callable[[Tensor], object], x: Tensor, times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            operation(x)

    return run


def rank_main(folder: Path, rounds: int) -> None:
    begin_worker()
    torch.set_num_threads(1)
    groups = ProcessGroups.connect(Mesh.of(tp=int(os.environ["WORLD_SIZE"])), shared_memory="on")
    groups.begin_run(new_shapes=False)
    shared = groups.bind(all_reduce, "tp", node="benchmark", options={}, overwrite=True)
    found = {}
    for name, size in SIZES.items():
        x = torch.full((size // 4,), float(groups.rank + 1))
        expected = x.clone()
        dist.all_reduce(expected)
        if not torch.equal(shared(x.clone()), expected):
            sys.exit(f"{name}: the sums differ")
        x.zero_()  # sums of sums would overflow
        times = {OURS: again(shared, x, repeats(size)), GLOO: again(dist.all_reduce, x, repeats(size))}
        take_turns(times, rounds=2, meet=groups.barrier)
        found[name] = take_turns(times, rounds=rounds, meet=groups.barrier)
    if groups.rank == 0:
        (folder / "times.json").write_text(json.dumps(found))
    groups.barrier()
    groups.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="all_reduce through shared memory, against gloo.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given.rank, given.rounds)
        return
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        command = ["benchmarks.shared_memory", "--rank", folder, "--rounds", str(given.rounds)]
        launch_ranks(command, num_ranks=given.ranks, timeout_s=600)
        found = json.loads(Path(folder, "times.json").read_text())
    table = Table()
    for column in ("size", f"{OURS}, us", f"{GLOO}, us", "ratio", "of best"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, times in found.items():
        ours, gloo = ([one / repeats(SIZES[name]) for one in times[which]] for which in (OURS, GLOO))
        medians = (f"{sorted(of_one)[len(of_one) // 2] * 1e6:.1f}" for of_one in (ours, gloo))
        table.add_row(name, *medians, str(Ratio.of(ours, gloo)), of_best(ours, gloo))
    print_table(f"all_reduce, {given.ranks} processes", table)
    console.print(f"load {before:.1f} before it began, on {os.cpu_count()} cores", markup=False)


if __name__ == "__main__":
    main()
