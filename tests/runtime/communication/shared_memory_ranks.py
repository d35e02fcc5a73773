"""What each of several processes checks of shared memory.

    python -P -m tests.runtime.communication.shared_memory_ranks CASE

A failing assert ends the launch. Started by test_shared_memory.py.
"""

import functools
import operator
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from partitioner.errors import CommunicationError, RankLost, RankMismatch
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.communication.shared_memory.shared_memory import SLOT_BYTES, _library
from runtime.ops.collectives import all_gather, all_reduce
from runtime.processes.launch import begin_worker

SIZES = [0, 1, 7, 1024, 5001, SLOT_BYTES // 4, 3 * SLOT_BYTES // 4 + 1]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def bound(
    groups: ProcessGroups, op: Callable[..., Tensor], axis: str = "tp", overwrite: bool = False, **options: object
) -> Callable[[Tensor], Tensor]:
    return groups.bind(op, axis, node="n", options=options, overwrite=overwrite)


def piece(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a rank brings: every rank knows what all bring."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)


def in_order(pieces: list[Tensor]) -> Tensor:
    wide = torch.float64 if pieces[0].dtype == torch.float64 else torch.float32
    return functools.reduce(operator.add, [one.to(wide) for one in pieces]).to(pieces[0].dtype)


def results(groups: ProcessGroups) -> None:
    num_ranks, rank = groups.mesh.world_size, groups.rank
    for checked in (False, True):
        groups.begin_run(new_shapes=checked)
        for dtype in FLOATS:
            for size in SIZES:
                pieces = [piece(other, size, dtype=dtype) for other in range(num_ranks)]
                expected, mine = in_order(pieces), pieces[rank].clone()
                assert torch.equal(bound(groups, all_reduce)(mine), expected)
                assert torch.equal(mine, pieces[rank]), "the input has other readers"
                assert bound(groups, all_reduce, overwrite=True)(mine) is mine
                assert torch.equal(mine, expected)
                if dtype == torch.float64:
                    over_gloo = pieces[rank].clone()
                    dist.all_reduce(over_gloo)
                    torch.testing.assert_close(over_gloo, expected, rtol=1e-14, atol=1e-14)
        assert bound(groups, all_reduce)(torch.ones(3, dtype=torch.int32)).tolist() == [num_ranks] * 3
        turned = bound(groups, all_reduce)(piece(rank, 5, 3).t())
        assert torch.equal(turned, in_order([piece(other, 5, 3).t() for other in range(num_ranks)]))
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            for dim in (0, 1, -1):
                pieces = [piece(other, 3, 5, 2, dtype=dtype) for other in range(num_ranks)]
                assert torch.equal(bound(groups, all_gather, dim=dim)(pieces[rank]), torch.cat(pieces, dim))
        uneven = [[2, 0, 3, 1], [SLOT_BYTES // 2, 1, SLOT_BYTES // 4, 5]]
        for sizes in (each[:num_ranks] for each in uneven):
            for dim in (0, 1):
                whole = piece(0, *((sum(sizes), 3) if dim == 0 else (3, sum(sizes))))
                mine = whole.split(sizes, dim)[rank]
                assert torch.equal(bound(groups, all_gather, dim=dim, sizes=sizes)(mine), whole)
                with pytest.raises(CommunicationError, match="this rank must bring"):
                    bound(groups, all_gather, dim=dim, sizes=[size + 1 for size in sizes])(mine)


def in_a_row(groups: ProcessGroups) -> None:
    """Thousands of operations, alternately small and large, of ranks that are early or late at random."""
    groups.begin_run(new_shapes=False)
    num_ranks, rank = groups.mesh.world_size, groups.rank
    late = random.Random(rank)
    reduce, gather = bound(groups, all_reduce), bound(groups, all_gather, dim=0)
    triangle = num_ranks * (num_ranks + 1) // 2
    for step in range(3000):
        if late.random() < 0.02:
            time.sleep(late.random() * 0.004)
        size = 3 * SLOT_BYTES // 8 if step % 500 == 0 else step % 7 + 1
        if step % 3:
            found = reduce(torch.full((size,), float((rank + 1) * (step + 1))))
            assert found.min() == found.max() == triangle * (step + 1)
        else:
            found = gather(torch.full((size,), float(rank + step)))
            expected = torch.arange(step, step + num_ranks, dtype=torch.float32).repeat_interleave(size)
            assert torch.equal(found, expected)


def disagreements(groups: ProcessGroups) -> None:
    odd = groups.rank == 1
    groups.begin_run(new_shapes=False)
    cases = {
        "operation": (all_gather if odd else all_reduce, {"dim": 0} if odd else {}, torch.ones(2)),
        "size": (all_reduce, {}, torch.ones(SLOT_BYTES if odd else 2)),
        "dtype": (all_reduce, {}, torch.ones(2, dtype=torch.float64 if odd else torch.float32)),
    }
    for op, options, x in cases.values():
        with pytest.raises(RankMismatch) as caught:
            bound(groups, op, **options)(x)
        assert "rank 0: an all_reduce of torch.float32, elements: 2\n" in str(caught.value)
        assert "\n  rank 1: an all_" in str(caught.value)
        assert f"this one is rank {groups.rank}: node 'n'" in str(caught.value)
        assert bound(groups, all_reduce)(torch.ones(1)).item() == groups.mesh.world_size, "all are together again"


def compiled(groups: ProcessGroups) -> None:
    """torch.compile leaves the operations as they are, without a word."""
    groups.begin_run(new_shapes=False)
    reduce, gather = bound(groups, all_reduce, overwrite=True), bound(groups, all_gather, dim=-1)

    def layer(x: Tensor) -> Tensor:
        return gather(reduce(x * 2).relu()) + 1

    x = piece(groups.rank, 2, 3)
    for _ in range(3):
        assert torch.equal(torch.compile(layer, backend="eager", dynamic=False)(x), layer(x))


def nothing_is_left(groups: ProcessGroups) -> None:
    """Not even while it is in use: a crash has nothing to leave behind."""
    assert not [path for path in Path("/dev/shm").iterdir() if "partitioner" in path.name]


def interrupted(groups: ProcessGroups) -> None:
    """Ctrl-C while waiting, during which other threads run; what comes after is refused, on every rank."""
    groups.begin_run(new_shapes=False)
    reduce = bound(groups, all_reduce)
    if groups.rank == 0:

        def interrupt(number: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupt)
        ticks: list[float] = []
        stop = threading.Event()

        def tick() -> None:
            while not stop.wait(0.01):
                ticks.append(time.monotonic())

        thread = threading.Thread(target=tick)
        thread.start()
        start = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            reduce(torch.ones(1))
        assert time.monotonic() - start < 4
        stop.set()
        thread.join()
        assert len(ticks) > 3
        with pytest.raises(RankLost, match="broken before this operation"):
            reduce(torch.ones(1))
        groups.close()
    else:
        time.sleep(5)
        reduce(torch.ones(1))  # rank 0 had brought its part before it was interrupted
        with pytest.raises(RankLost):
            reduce(torch.ones(1))
        with pytest.raises(RankLost):
            reduce(torch.ones(1))
        groups.close()


def several_axes() -> None:
    groups = ProcessGroups.connect(Mesh.of(dp=2, tp=2), shared_memory="on")
    assert groups.transports == {"dp": "shared memory", "tp": "shared memory"}
    groups.begin_run(new_shapes=True)
    x = torch.tensor([float(groups.rank)])
    for _ in range(100):
        assert bound(groups, all_gather, "tp", dim=0)(x).tolist() == [groups.rank // 2 * 2, groups.rank // 2 * 2 + 1]
        assert bound(groups, all_gather, "dp", dim=0)(x).tolist() == [groups.rank % 2, groups.rank % 2 + 2]
    groups.barrier()
    groups.close()


def without_a_compiler() -> None:
    _library.cache_clear()  # a copy of a process that has one
    groups = ProcessGroups.connect(Mesh.of(tp=2))
    assert groups.transports == {"tp": "gloo: rank 0: no C++ compiler found (no-such-compiler)"}
    groups.begin_run(new_shapes=True)
    assert bound(groups, all_reduce)(torch.ones(2)).tolist() == [2, 2]
    groups.barrier()
    groups.close()
    with pytest.raises(CommunicationError, match=r"along 'tp' cannot talk through shared memory: .*no C\+\+ compiler"):
        ProcessGroups.connect(Mesh.of(tp=2), shared_memory="on")
    assert not dist.is_initialized()


def over_gloo() -> None:
    without_a_compiler()
    several_hosts()


def several_hosts() -> None:
    """The host's name is changed, which is all that the ranks compare before they try."""
    import runtime.communication.shared_memory.shared_memory

    runtime.communication.shared_memory.shared_memory._host = lambda: f"host {os.environ['RANK']}"
    groups = ProcessGroups.connect(Mesh.of(tp=2), shared_memory="on")
    assert groups.transports == {"tp": "gloo: the ranks 0, 1 are on several hosts"}
    groups.begin_run(new_shapes=True)
    assert bound(groups, all_reduce)(torch.ones(2)).tolist() == [2, 2]
    groups.barrier()
    groups.close()


ALIVE = [results, in_a_row, disagreements, nothing_is_left]
ALONE = {function.__name__: function for function in (several_axes, over_gloo)}

if __name__ == "__main__":
    warnings.simplefilter("error")
    begin_worker()
    if sys.argv[1] in ALONE:
        ALONE[sys.argv[1]]()
    else:
        num_ranks = int(os.environ["WORLD_SIZE"])
        with_all = ProcessGroups.connect(Mesh.of(tp=num_ranks), timeout_s=60, shared_memory="on")
        assert with_all.transports == {"tp": "shared memory"}
        for check in ALIVE if num_ranks == 2 else [*ALIVE, compiled]:
            check(with_all)
        with_all.barrier()
        if num_ranks == 2:
            interrupted(with_all)
        with_all.close()
