"""All-reduces between the GPUs of one host, 8 KB to 128 MB of bfloat16: NCCL, torch's symmetric memory, and ours.

    nccl                 torch.distributed.all_reduce
    one-shot, two-shot   torch.ops.symm_mem: its input must lie in symmetric memory, which its copying variants see to
    small, large         kernels of ours (runtime/communication/peer_memory)
    chosen               what a model's all-reduce takes by default: its time is that of the way it names

Microseconds of one call, in a CUDA graph of several; the ways take turns, and of the rounds the median counts, of the
ranks the longest.

    python -m benchmarks.gpu.all_reduce              two ranks, a GPU each; half a minute
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist

from benchmarks.support.ranks import launch_ranks
from partitioner.sharding.mesh import Mesh
from runtime.communication.peer_memory.measure import candidates, microseconds
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.communication.process_groups import ProcessGroups
from runtime.processes.launch import begin_worker

SIZES = [2**power for power in range(13, 28)]


def stock(peers: PeerMemory, num_bytes: int) -> dict[str, Callable[[], object]]:
    """Torch's own over symmetric memory; what it sums is copied there first, as what a model computes must be."""
    from torch.distributed import _symmetric_memory as symmetric

    group = peers.group.handle
    memory = symmetric.empty(num_bytes // 2, dtype=torch.bfloat16, device=peers.device)
    symmetric.rendezvous(memory, group.group_name)
    x = torch.randn_like(memory)

    def two_shot() -> object:
        memory.copy_(x)
        return torch.ops.symm_mem.two_shot_all_reduce_(memory, "sum", group.group_name)

    found: dict[str, Callable[[], object]] = {"two-shot": two_shot}
    if num_bytes <= 2**25:
        found["one-shot"] = lambda: torch.ops.symm_mem.one_shot_all_reduce_copy(memory, x, "sum", group.group_name)
    return found


@torch.no_grad()
def rank(given: argparse.Namespace) -> None:
    groups = ProcessGroups.connect(Mesh.of(tp=given.ranks), device="cuda", shared_memory="on")
    (peers,) = groups.peers.values()
    rows: list[tuple[int, dict[str, float]]] = []
    for num_bytes in SIZES:
        ways = {**candidates(peers, "all_reduce", num_bytes), **stock(peers, num_bytes)}
        times = microseconds(ways, peers.device, calls=50 if num_bytes < 2**20 else 6, rounds=11)
        longest = torch.tensor(list(times.values()), dtype=torch.float64, device=peers.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=peers.group.handle)
        rows.append((num_bytes, dict(zip(times, longest.tolist(), strict=True))))
    if groups.rank == 0:
        table(rows, peers)
    groups.close()


def table(rows: list[tuple[int, dict[str, float]]], peers: PeerMemory) -> None:
    print(f"{peers.group.size} x {torch.cuda.get_device_name()}, torch {torch.__version__}, microseconds of a call")
    names = ["nccl", "one-shot", "two-shot", "small", "large", "in two"]
    print(f"{'bytes':>10} " + "".join(f"{name:>10}" for name in names) + "    chosen  of the best  of NCCL")
    for num_bytes, times in rows:
        chosen: Any = peers.choice.of("all_reduce", num_bytes)
        shown = "".join(f"{times[name]:10.1f}" if name in times else " " * 10 for name in names)
        took = times[chosen]
        print(f"{num_bytes:10} {shown} {chosen:>9} {took / min(times.values()):12.2f} {took / times['nccl']:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="All-reduces between GPUs of one host.")
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args()
    if "RANK" in os.environ:
        begin_worker()
        rank(given)
    else:
        launch_ranks(["benchmarks.gpu.all_reduce", "--ranks", str(given.ranks)], num_ranks=given.ranks, timeout_s=300)


if __name__ == "__main__":
    main()
