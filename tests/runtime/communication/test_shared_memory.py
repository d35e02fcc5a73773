"""Shared memory: the protocol rank by rank in one process, then between processes."""

import ctypes
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from partitioner.errors import CommunicationError
from partitioner.sharding.mesh import Mesh
from runtime.communication.matching_calls import Call
from runtime.communication.process_groups import ProcessGroups
from runtime.communication.shared_memory.shared_memory import Disconnected, SharedMemory, _library
from runtime.processes.launch import launch
from tests.runtime.communication.shared_memory_ranks import in_order

DONE, WAITING = 0, 1
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
SLOT_BYTES = 64


def ends(num_ranks: int, slot_bytes: int = SLOT_BYTES) -> list[SharedMemory]:
    """Every rank's end, all in this process."""
    segment = SharedMemory.segment(_library(60.0), num_ranks, slot_bytes=slot_bytes)
    ranks = range(num_ranks)
    return [SharedMemory(_library(60.0), segment, ranks, r, slot_bytes=slot_bytes, timeout_s=1) for r in ranks]


def finish(memory: list[SharedMemory], statuses: list[int], order: random.Random) -> None:
    """Without anyone ever waiting: who cannot go on is asked again later."""
    library = _library(60.0).library
    for _ in range(10_000):
        waiting = [rank for rank, status in enumerate(statuses) if status == WAITING]
        if not waiting:
            break
        rank = order.choice(waiting)
        statuses[rank] = library.group_advance(memory[rank]._group, 0)
    assert statuses == [DONE] * len(memory)


def reduced(memory: list[SharedMemory], pieces: list[Tensor], order: random.Random) -> list[Tensor]:
    library = _library(60.0).library
    outs, statuses = [torch.empty_like(piece) for piece in pieces], [WAITING] * len(memory)
    for rank in order.sample(range(len(memory)), len(memory)):
        x, out = pieces[rank], outs[rank]
        statuses[rank] = library.group_all_reduce(
            memory[rank]._group, x.data_ptr(), out.data_ptr(), x.numel(), TYPES[x.dtype], 0
        )
    finish(memory, statuses, order)
    return outs


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", TYPES)
def test_sums_are_taken_in_order_and_alike_on_every_rank(dtype: torch.dtype, num_ranks: int) -> None:
    memory, order = ends(num_ranks), random.Random(0)
    per_slot = SLOT_BYTES // dtype.itemsize
    for size in (0, 1, 5, per_slot - 1, per_slot, per_slot + 1, 2 * per_slot, 7 * per_slot + 3):
        pieces = [torch.randn(size).to(dtype) for _ in range(num_ranks)]
        for found in reduced(memory, pieces, order):
            assert torch.equal(found, in_order(pieces)), size


def test_in_another_order_the_sums_would_differ() -> None:
    pieces = [torch.tensor([1e8]), torch.tensor([-1e8]), torch.tensor([1e-3])]
    assert in_order(pieces) != in_order(pieces[::-1])
    assert [found.item() for found in reduced(ends(3), pieces, random.Random(0))] == [in_order(pieces).item()] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_two_bytes_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    memory, order = ends(2, slot_bytes=every.nbytes), random.Random(0)
    others = [torch.zeros_like(every), torch.full_like(every, 2.0**-24), torch.full_like(every, 1.0)]
    others += [every[torch.randperm(len(every), generator=torch.Generator().manual_seed(i))] for i in range(20)]
    for other in others:
        found = reduced(memory, [every, other], order)[1]
        expected = in_order([every, other])
        assert torch.equal(found.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(found[number].view(torch.int16), expected[number].view(torch.int16))


def test_order_of_arrival_never_matters() -> None:
    """Gathers and sums of any length in turn, the ranks going on in any order."""
    order = random.Random(0)
    library = _library(60.0).library
    for num_ranks in (2, 3, 4):
        memory = ends(num_ranks)
        for _ in range(200):
            size = order.choice([1, 8, 100])
            pieces = [torch.randn(size) for _ in range(num_ranks)]
            assert all(torch.equal(found, in_order(pieces)) for found in reduced(memory, pieces, order))
            sizes = [order.randrange(40) for _ in range(num_ranks)]
            whole = torch.randn(3, sum(sizes))
            widths = (ctypes.c_int64 * num_ranks)(*(4 * each for each in sizes))
            parts = [part.contiguous() for part in whole.split(sizes, 1)]
            outs, statuses = [torch.empty_like(whole) for _ in sizes], []
            for rank in range(num_ranks):
                place = (parts[rank].data_ptr(), outs[rank].data_ptr())
                statuses.append(library.group_all_gather(memory[rank]._group, *place, 3, widths, 0))
            finish(memory, statuses, order)
            assert all(torch.equal(out, whole) for out in outs)


def test_sequence_numbers_wrap_around() -> None:
    memory, order = ends(2), random.Random(0)
    # the first field of every rank's line, and the rank's own copy behind base, size, rank, slot and spin
    for rank, end in enumerate(memory):
        ctypes.c_uint32.from_address(end._segment.start + 128 * rank).value = 2**32 - 3
        ctypes.c_uint32.from_address(end._group + 8 + 4 + 4 + 8 + 16).value = 2**32 - 3
    for step in range(6):
        pieces = [torch.tensor([float(step)]), torch.tensor([1.0])]
        assert [found.item() for found in reduced(memory, pieces, order)] == [step + 1] * 2
    assert ctypes.c_uint32.from_address(memory[0]._segment.start).value == 3


def test_after_close_nothing_is_touched() -> None:
    memory = ends(2)
    reduce = memory[0].all_reduce(Call(0, "n", "all_reduce", "tp"), overwrite=False)
    memory[0].close()
    with pytest.raises(Disconnected, match="closed or broken before this operation"):
        reduce(torch.ones(1))


def test_what_is_no_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CommunicationError, match="must be one of auto, on, off; got 'yes'"):
        ProcessGroups.connect(Mesh.of(tp=2), shared_memory="yes")  # type: ignore[arg-type]
    with pytest.raises(CommunicationError, match="is for ranks on CPU or CUDA, these are on meta"):
        ProcessGroups.connect(Mesh.of(tp=2), device=torch.device("meta"), shared_memory="on")


@pytest.fixture
def _path(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(case: str, num_ranks: int) -> None:
    launch(["tests.runtime.communication.shared_memory_ranks", case], num_ranks=num_ranks, timeout_s=150)


@pytest.mark.processes
@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("num_ranks", [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 4))])
def test_between_processes(num_ranks: int) -> None:
    run("all", num_ranks)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("_path")
def test_every_axis_has_memory_of_its_own() -> None:
    run("several_axes", 4)


@pytest.mark.processes
@pytest.mark.usefixtures("_path")
def test_without_a_compiler_it_says_so_and_ranks_of_several_hosts_use_gloo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    run("over_gloo", 2)
    assert "talk over gloo, not through shared memory: rank 0: no C++ compiler found" in capfd.readouterr().err
