"""Every primitive over the GPUs' own memory, against what torch computes.

On one GPU: all ranks in this process, each on a stream of its own, with memory of the same GPU. Their kernels wait for
each other as those of several GPUs do. On several: a process for each, and real links.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runtime.communication.channels import Handle
from runtime.communication.group_collectives import Group
from runtime.communication.peer_memory.choice import Choice, Way
from runtime.communication.peer_memory.mapped_memory import Geometry
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.processes.launch import launch
from tests.gpu.peer_cases import Case, brought, exchanges, pieces, summed, sums

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


class Ranks:
    """All ranks of a group, here."""

    def __init__(self, num_ranks: int, *, never_wait: bool = False) -> None:
        geometry = Geometry(num_ranks)
        memories = [torch.zeros(geometry.num_bytes, dtype=torch.uint8, device="cuda") for _ in range(num_ranks)]
        if never_wait:  # what is waited for has come, as far as a first call can see
            for memory in memories:
                memory.view(torch.int32).fill_(1)
                memory[geometry.start_of_flags :].view(torch.int32).fill_(1 << 30)

        def buffer(rank: int, shape: tuple[int], dtype: torch.dtype, offset: int) -> torch.Tensor:
            return memories[rank].view(dtype)[offset : offset + shape[0]]

        handle: Any = SimpleNamespace(buffer_ptrs=[memory.data_ptr() for memory in memories], get_buffer=buffer)
        ranks, nobody = tuple(range(num_ranks)), None
        self.peers = [
            PeerMemory(Group(nobody, ranks, rank, True), memory, handle, timeout_s=20)  # type: ignore[arg-type]
            for rank, memory in enumerate(memories)
        ]
        for peers in self.peers:
            peers._blocks = 16  # all blocks of all ranks must run at once: those that wait hold their processor
        self.streams = [torch.cuda.Stream() for _ in ranks]
        torch.cuda.synchronize()

    def each(self, call: Callable[[PeerMemory, int], Any]) -> list[Any]:
        """Begun on all streams before anybody waits for the host."""
        found = []
        for rank, (peers, stream) in enumerate(zip(self.peers, self.streams, strict=True)):
            with torch.cuda.stream(stream):
                found.append(call(peers, rank))
        return found


def not_by_nccl(*operands: Any) -> Any:
    raise AssertionError("NCCL was asked")


def run(case: Case, way: Way, ranks: Ranks) -> None:
    def call(peers: PeerMemory, rank: int) -> torch.Tensor:
        peers.choice = Choice.always(way)
        operands = case.operands[rank] if case.operands else ()
        found = peers.prepare(case.kind, otherwise=not_by_nccl, **case.options)(case.brought[rank], *operands)
        return found.finish() if isinstance(found, Handle) else found

    # a kernel that is loaded while another waits for it would wait for that one
    before = [x.clone() for x in case.brought]
    for rank in range(len(case.brought)):
        call(Ranks(len(case.brought), never_wait=True).peers[rank], rank)
        torch.cuda.synchronize()
    for x, original in zip(case.brought, before, strict=True):
        x.copy_(original)
    torch.cuda.synchronize()
    results = ranks.each(call)
    torch.cuda.synchronize()
    for rank, found in enumerate(results):
        case.check(rank, found, way)
        assert not ranks.peers[rank].late()


@pytest.mark.parametrize("way", ["small", "large", "in two"])
@pytest.mark.parametrize("cases", [sums, pieces, exchanges], ids=lambda cases: cases.__name__)
def test_two_ranks_of_one_gpu(cases: Callable[[int], Any], way: Way) -> None:
    ranks = Ranks(2)
    for case in cases(2):
        run(case, way, ranks)


def test_four_ranks_of_one_gpu() -> None:
    ranks = Ranks(4)
    for way in ("small", "large", "in two"):
        for size in (1, 4100, 100_003):
            parts = [brought(rank, (size,), torch.bfloat16, size) for rank in range(4)]
            run(Case("all_reduce", parts, [summed(parts)] * 4), way, ranks)
            run(Case("permute", parts, [parts[rank - 1] for rank in range(4)], {"shift": 1}), way, ranks)
            run(Case("all_gather", parts, [torch.cat(parts)] * 4, {"dim": 0}), way, ranks)
    for case in exchanges(4):
        run(case, "large", ranks)


@pytest.mark.parametrize("way", ["small", "large"])
def test_a_replayed_call_is_a_new_call(way: Way) -> None:
    ranks, sizes = Ranks(2), (4096, 70_000)
    inputs = [[torch.zeros(size, dtype=torch.bfloat16, device="cuda") for size in sizes] for _ in range(2)]
    for size in sizes:
        parts = [brought(rank, (size,), torch.bfloat16, 0) for rank in range(2)]
        run(Case("all_reduce", parts, [summed(parts)] * 2), way, ranks)
    graphs, results = [], []
    for rank, peers in enumerate(ranks.peers):
        reduce = peers.prepare("all_reduce", otherwise=not_by_nccl)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=ranks.streams[rank]):
            results.append([reduce(x) for x in inputs[rank]])
        graphs.append(graph)
    for seed in range(50):
        parts = [[brought(rank, (size,), torch.bfloat16, seed) for rank in range(2)] for size in sizes]
        for rank in range(2):
            for x, of_size in zip(inputs[rank], parts, strict=True):
                x.copy_(of_size[rank])
        torch.cuda.synchronize()
        ranks.each(lambda _, rank: graphs[rank].replay())
        torch.cuda.synchronize()
        for rank in range(2):
            for found, of_size in zip(results[rank], parts, strict=True):
                assert torch.equal(found, summed(of_size)), (rank, seed)


def test_who_does_not_come_is_named_while_the_kernel_waits() -> None:
    ranks = Ranks(2)
    waiting = ranks.peers[0]
    waiting._patience_ns = 10_000_000
    parts = [brought(rank, (4096,), torch.bfloat16, 0) for rank in range(2)]
    for way in ("small", "large"):
        run(Case("all_reduce", parts, [summed(parts)] * 2), way, ranks)
        assert waiting.late() == []
        begun = torch.cuda.Event()
        with torch.cuda.stream(ranks.streams[0]):
            first = waiting.prepare("all_reduce", otherwise=not_by_nccl)(parts[0])
            begun.record()
        deadline = time.monotonic() + 10
        while not waiting.late() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert waiting.late() == [1]
        assert not begun.query()  # it goes on waiting: the host decides what follows
        with torch.cuda.stream(ranks.streams[1]):
            second = ranks.peers[1].prepare("all_reduce", otherwise=not_by_nccl)(parts[1])
        torch.cuda.synchronize()
        assert torch.equal(first, summed(parts))
        assert torch.equal(second, first)
        waiting._late.zero_()


def test_a_kernel_that_waits_ends_when_it_is_abandoned() -> None:
    for way in ("small", "large"):
        ranks = Ranks(2)
        x = brought(0, (4096,), torch.bfloat16, 0)
        run(Case("all_reduce", [x, x], [summed([x, x])] * 2), way, ranks)
        with torch.cuda.stream(ranks.streams[0]):
            ranks.peers[0].prepare("all_reduce", otherwise=not_by_nccl)(x)
        time.sleep(0.05)
        assert not ranks.streams[0].query()
        ranks.peers[0].abandon()
        ranks.streams[0].synchronize()


@several
@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "primitives",
        "counts_on_the_device",
        "in_graphs",
        "many_calls",
        "beside_others",
        "rows_beside_others",
        "few_rows_with_norms",
        "heads_in_place",
        "exchanged_experts",
        "copied_beside_others",
        "merged_parts",
    ],
)
def test_between_gpus(case: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.gpu.peer_rank", case], num_ranks=torch.cuda.device_count(), timeout_s=180)
