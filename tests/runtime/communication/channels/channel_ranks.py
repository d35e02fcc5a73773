"""What each of several processes checks of the channels; a failing assert ends the launch. Started by test_channels.py.

python -P -m tests.runtime.communication.channels.channel_ranks DEVICE SHARING
"""

import os
import sys
import time
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from partitioner.errors import CommunicationError, RankMismatch
from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import Channel
from runtime.communication.process_groups import ProcessGroups
from runtime.communication.traceable import Traceable
from runtime.ops.collectives import all_gather, all_reduce
from runtime.processes.launch import begin_worker
from tests.runtime.communication.channels.channel_cases import every_primitive, piece
from tests.support.processes.few_gpus import device_of_rank


def disagreements(groups: ProcessGroups) -> None:
    """Told by a checked run, on every rank that takes part, before anything is done."""
    groups.begin_run(new_shapes=True)
    odd = groups.rank == 1
    num_ranks = groups.mesh.size("tp")
    ones = torch.ones(num_ranks)

    def refused(case: str, run: Callable[[Channel], object], named: str) -> None:
        channel = groups.channel("tp", node=f"{case}_{groups.rank}")
        with pytest.raises(RankMismatch) as caught:
            run(channel)
        assert f"rank 0: node '{case}_0', {named}" in str(caught.value), caught.value
        assert f"rank 1: node '{case}_1'" in str(caught.value), caught.value

    refused("scattered", lambda c: c.all_gather(ones, 0) if odd else c.reduce_scatter(ones, 0), "reduce_scatter")
    refused("shifted", lambda c: c.permute_begin(ones, 2 if odd else 1), "permute")
    refused("dtype", lambda c: c.permute_begin(ones.double() if odd else ones, 1), "permute")
    refused("again", lambda c: c.persistent_permute(ones, 2 if odd else 1).begin(), "permute")
    counts = [1] * num_ranks
    refused("source", lambda c: c.all_to_all(ones, counts, counts, sizes_from=f"n{odd}"), "all_to_all")
    expected = [2, *counts[1:]] if odd else counts
    refused("counts", lambda c: c.all_to_all(ones, counts, expected), "all_to_all")
    if groups.rank < 2:
        refused("swapped", lambda c: c.send_begin(ones, 1 - c.rank), "send to rank 1")
        refused("both", lambda c: c.receive_begin((2,), torch.float32, 1 - c.rank), "receive from rank 1")
        refused(
            "shape",
            lambda c: c.receive_begin((5,), torch.float32, 0) if odd else c.send_begin(ones, 1),
            "send to rank 1",
        )
    groups.barrier()


def as_the_compiler_sees_them(groups: ProcessGroups) -> None:
    """Equal to the eager primitives, in one graph."""
    groups.begin_run(new_shapes=False)
    num_ranks, own = groups.mesh.size("tp"), groups.rank
    counts = [[i + j for j in range(num_ranks)] for i in range(num_ranks)]
    received = [row[own] for row in counts]

    def all_of_them(channel: Channel, x: Tensor, rows: Tensor) -> list[Tensor]:
        begun = channel.permute_begin(x * 2, 1)
        found = [
            channel.all_reduce(x + 1),
            channel.reduce_scatter(x + 1, 0, [x.shape[0] - num_ranks + 1] + [1] * (num_ranks - 1)),
            channel.reduce_scatter(x + 1, 1),
            channel.all_gather(x, -1),
            channel.all_to_all(rows, counts[own], received),
        ]
        if own == 0:
            found.append(channel.send_begin(x + 3, 1).finish())
        elif own == 1:
            found.append(channel.receive_begin(x.shape, x.dtype, 0).finish() + 1)
        return [*found, begun.finish() + 1]

    x, rows = piece(own, 5, 2 * num_ranks), piece(own, sum(counts[own]), 2)
    expected = all_of_them(groups.channel("tp", node="eager"), x, rows)
    channel = Traceable(groups).channel("tp", node="traced")
    compiled = torch.compile(lambda x, rows: all_of_them(channel, x, rows), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for found, once in zip(compiled(x, rows), expected, strict=True):
            assert torch.equal(found, once)


def a_group_that_nobody_made(groups: ProcessGroups) -> None:
    with pytest.raises(CommunicationError, match=r"node 'n' communicates over 'pp x tp'.*there are tp: name it"):
        ProcessGroups._group(groups, ("pp", "tp"), (0, 99), "n")


def several_axes(device: str) -> None:
    """A product group, and the single ones beside it, named in another order on every rank."""
    mesh = Mesh.of(dp=2, tp=2)
    named = [("dp",), ("tp",), ("dp", "tp")]
    turned = int(os.environ["RANK"]) % 3
    groups = ProcessGroups.connect(mesh, device=device, axes=named[turned:] + named[:turned], timeout_s=60)
    assert list(groups.transports) == ["dp", "tp", "dp x tp"]
    for checked in (False, True):
        groups.begin_run(new_shapes=checked)
        for axes in named:
            every_primitive(groups.channel(axes, node="n"))
        x = torch.tensor([float(groups.rank)])
        assert groups.bind(all_reduce, ("dp", "tp"), node="sum", options={})(x).item() == 6
        assert groups.bind(all_gather, ("dp", "tp"), node="join", options={"dim": 0})(x).tolist() == [0, 1, 2, 3]
        assert groups.bind(all_reduce, ("dp",), node="sum", options={})(x).item() == 2 + 2 * (groups.rank % 2)
    groups.barrier()
    groups.close()


def peers_that_never_send() -> None:
    """Unchecked, each waits for the other to send: both end at the deadline, told what the other waits for."""
    groups = ProcessGroups.connect(Mesh.of(tp=2), timeout_s=2)
    groups.begin_run(new_shapes=False)
    channel = groups.channel("tp", node="n")
    started = time.monotonic()
    handle = channel.receive_begin((2,), torch.float32, 1 - groups.rank)
    with pytest.raises(RankMismatch, match="wait for each other") as caught:
        handle.finish()
    for rank in range(2):
        assert f"rank {rank}: node 'n', receive from rank {1 - rank}" in str(caught.value)
    assert time.monotonic() - started < 15
    groups.close()


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the compiler's own imports
    begin_worker()
    device, case = sys.argv[1:]
    device = device_of_rank(device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with torch.device(device):
        if case == "axes":
            several_axes(device)
        else:
            mesh = Mesh.of(tp=int(os.environ["WORLD_SIZE"]))
            connected = ProcessGroups.connect(mesh, device=device, timeout_s=60, shared_memory=case)  # type: ignore[arg-type]
            for check in (False, True):
                connected.begin_run(new_shapes=check)
                every_primitive(connected.channel("tp", node="n"))
            disagreements(connected)
            as_the_compiler_sees_them(connected)
            a_group_that_nobody_made(connected)
            connected.barrier()
            connected.close()
            if mesh.world_size == 2 and device == "cpu":
                peers_that_never_send()
