"""What each of four processes checks; a failing assert ends the launch. Started by test_own_groups.py.

Its arguments are the device, a folder, whether the program has a default group of its own, and which engine's groups
end first.
"""

import os
import sys
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
from torch import distributed as dist

from partitioner.errors import RankLost
from partitioner.sharding.mesh import Mesh
from runtime.communication import process_groups
from runtime.communication.process_groups import ProcessGroups
from runtime.ops.collectives import all_reduce
from runtime.processes.launch import begin_worker
from runtime.processes.place import Place
from tests.support.processes.few_gpus import device_of_rank

MINE = int(os.environ["RANK"])


def checked(groups: ProcessGroups, axis: str, expected: float, neighbour: float) -> None:
    x = torch.tensor([float(MINE)], device=groups.device)
    groups.barrier()
    assert groups.bind(all_reduce, axis, node="sum", options={})(x).item() == expected
    assert groups.channel(axis, node="shift").permute_begin(x, 1).finish().item() == neighbour


def programs(has_one: bool) -> None:
    """The program's own default group, which is not disturbed."""
    assert dist.is_initialized() is has_one
    if has_one:
        assert dist.get_rank() == 3 - MINE
        x = torch.tensor([1.0])
        dist.all_reduce(x)
        assert x.item() == 4.0


def main(device: str, folder: str, own: str, first: str) -> None:
    device, has_one = device_of_rank(device), own == "with a default group"
    if has_one:  # its ranks are numbered as the program likes
        store = dist.FileStore(f"{folder}/store", 4)
        dist.init_process_group("gloo", store=store, rank=3 - MINE, world_size=4, timeout=timedelta(seconds=30))
    programs(has_one)
    with (
        patch.object(process_groups, "exchange_json", side_effect=ValueError("no")),
        pytest.raises((ValueError, RankLost)),
    ):
        ProcessGroups.connect(Mesh.of(tp=4), device=device)
    programs(has_one)

    all_four = ProcessGroups.connect(Mesh.of(tp=4), device=device, shared_memory="off")
    pairs = Mesh.of(tp=2)
    two = ProcessGroups.connect(pairs, place=Place.here(pairs, replicas=2), device=device, shared_memory="off")
    ends = {"four": (all_four, "tp", 6.0, (MINE - 1.0) % 4), "two": (two, "tp", 1.0 + 4 * (MINE // 2), MINE ^ 1)}
    for _ in range(2):
        for name in ("four", "two"):
            checked(*ends[name])
    later = "two" if first == "four" else "four"
    ends[first][0].barrier()
    ends[first][0].close()
    checked(*ends[later])
    if has_one:
        programs(has_one)
    ends[later][0].close()
    programs(has_one)
    for groups, *_ in ends.values():
        groups.close()  # once more
    again = ProcessGroups.connect(Mesh.of(tp=4), device=device, shared_memory="off")
    checked(again, *ends["four"][1:])
    if has_one and first == "four":
        dist.destroy_process_group()  # all of them
        assert not dist.is_initialized()
        has_one = False
    again.close()
    programs(has_one)


if __name__ == "__main__":
    begin_worker()
    main(*sys.argv[1:])
