"""One rank with a GPU of its own: `python -P -m tests.gpu.peer_rank CASE`; started by test_peer_memory.py.

Every rank knows what all ranks bring, and so what must come back.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import Channel
from runtime.communication.peer_memory.choice import Choice, Way
from runtime.communication.process_groups import ProcessGroups
from runtime.processes.launch import begin_worker

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SIZES = (0, 1, 3, 4, 7, 4096, 4100, 100_003, 262_144, 3_000_001)
WAYS: tuple[Way, ...] = ("small", "large", "in two")


def brought(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)
    return torch.randint(-100, 100, shape, generator=generator, device="cuda").to(dtype)


def summed(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    parts = [brought(rank, shape, dtype, seed) for rank in range(RANKS)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = parts[0].to(wide) if dtype.is_floating_point else parts[0].clone()
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def same(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    wrong = int((found != expected).sum())
    assert not wrong, f"rank {RANK}: {what}: {wrong} of {found.numel()} wrong"


def ways(groups: ProcessGroups) -> Iterator[Way]:
    (peers,) = groups.peers.values()
    for way in WAYS:
        peers.choice = Choice.always(way)
        yield way


def sums(groups: ProcessGroups, channel: Channel) -> None:
    for way in ways(groups):
        for seed, size in enumerate(SIZES):
            for dtype in (*FLOATS, torch.int32, torch.int64):
                x = brought(RANK, (size,), dtype, seed)
                same(channel.all_reduce(x), summed((size,), dtype, seed), f"all_reduce {way} {size} {dtype}")
                same(x, brought(RANK, (size,), dtype, seed), "what was brought")
        # no wide load may begin here, and not on all ranks
        x = torch.cat([x.new_zeros(1 + RANK), brought(RANK, (4096,), dtype, 3)])[1 + RANK :]
        same(channel.all_reduce(x), summed((4096,), dtype, 3), f"all_reduce {way} of a part")
        both = brought(RANK, (64, 33), torch.bfloat16, 4)
        same(channel.all_reduce(both.t()), summed((64, 33), torch.bfloat16, 4).t(), f"all_reduce {way} transposed")
        overwrite = channel.prepare("all_reduce", overwrite=True)
        same(overwrite(brought(RANK, (5000,), torch.bfloat16, 5)), summed((5000,), torch.bfloat16, 5), "overwritten")


def pieces(groups: ProcessGroups, channel: Channel) -> None:
    for way in ways(groups):
        for seed, (shape, dim) in enumerate([((8,), 0), ((3, 5), 0), ((4, 6, 7), 1), ((1, 2048), -1), ((999, 700), 1)]):
            for dtype in (torch.bfloat16, torch.float32, torch.int64, torch.uint8):
                all_of = [brought(rank, shape, dtype, seed) for rank in range(RANKS)]
                same(channel.all_gather(all_of[RANK], dim), torch.cat(all_of, dim), f"all_gather {way} {shape} {dtype}")
                sizes = [rank + 1 for rank in range(RANKS)]
                own = [
                    part.narrow(dim, 0, min(1, shape[dim])).repeat_interleave(s, dim)
                    for part, s in zip(all_of, sizes, strict=True)
                ]
                same(channel.all_gather(own[RANK], dim, sizes), torch.cat(own, dim), f"uneven all_gather {way} {shape}")
                shift = 1
                came = channel.permute_begin(all_of[RANK], shift).finish()
                same(came, all_of[(RANK - shift) % RANKS], f"permute {way} {shape} {dtype}")
            whole = (*shape[: dim % len(shape)], RANKS * 5, *shape[dim % len(shape) + 1 :])
            total = summed(whole, torch.float32, seed)
            x = brought(RANK, whole, torch.float32, seed)
            same(channel.reduce_scatter(x, dim), total.chunk(RANKS, dim)[RANK], f"reduce_scatter {way} {whole}")
            uneven = [5 * RANKS - (RANKS - 1) * 3, *[3] * (RANKS - 1)]
            part = total.split(uneven, dim)[RANK]
            same(channel.reduce_scatter(x, dim, uneven), part, f"uneven reduce_scatter {way} {whole}")
    exchanged(groups, channel)


def exchanged(groups: ProcessGroups, channel: Channel) -> None:
    (peers,) = groups.peers.values()
    for seed, width in enumerate((1, 7, 4096)):
        for counts in ([[2] * RANKS] * RANKS, [[i * j % 5 for j in range(RANKS)] for i in range(RANKS)], uneven()):
            rows = [brought(rank, (sum(counts[rank]), width), torch.bfloat16, seed) for rank in range(RANKS)]
            received = [counts[rank][RANK] for rank in range(RANKS)]
            expected = torch.cat([rows[rank].split(counts[rank])[RANK] for rank in range(RANKS)])
            found = channel.all_to_all(rows[RANK], counts[RANK], received)
            same(found, expected, f"all_to_all {counts} of {width}")
            room = torch.full((sum(received) + 9, width), 7.0, dtype=torch.bfloat16, device="cuda")
            on_device = torch.tensor([counts[RANK], received], device="cuda")
            same(peers.all_to_all(rows[RANK], room, on_device[0], on_device[1])[:-9], expected, "counts on the device")
            assert (room[-9:] == 7).all()


def uneven() -> list[list[int]]:
    return [[300 * i + 50 * j + 1 for j in range(RANKS)] for i in range(RANKS)]


def in_graphs(groups: ProcessGroups, channel: Channel) -> None:
    """Captured calls are new calls whenever they are replayed, between others of other sizes."""
    sizes = (1, 4096, 70_000, 2_000_000)
    for way in ways(groups):
        inputs = [torch.zeros(size, dtype=torch.bfloat16, device="cuda") for size in sizes]
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for x in inputs:
                channel.all_reduce(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [channel.all_reduce(x) for x in inputs] + [channel.all_gather(x, 0) for x in inputs]
        for seed in range(20):
            for x in inputs:
                x.copy_(brought(RANK, tuple(x.shape), torch.bfloat16, seed))
            for result in results:
                result.fill_(float("nan"))
            if seed % 3 == RANK:
                time.sleep(0.01)  # one comes late
            graph.replay()
            for x, total, gathered in zip(inputs, results[: len(sizes)], results[len(sizes) :], strict=True):
                shape = tuple(x.shape)
                same(total, summed(shape, torch.bfloat16, seed), f"replayed {way} {shape}")
                parts = [brought(rank, shape, torch.bfloat16, seed) for rank in range(RANKS)]
                same(gathered, torch.cat(parts), f"replayed all_gather {way} {shape}")
            same(channel.all_reduce(inputs[1]), summed((4096,), torch.bfloat16, seed), f"between replays {way}")
        graph.reset()


def many_calls(groups: ProcessGroups, channel: Channel) -> None:
    """Thousands in turn, of changing sizes, without waiting between them: no slot is written before it is read."""
    (peers,) = groups.peers.values()
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 400_000, (3000,), generator=generator).tolist()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for count, size in enumerate(steps):
        peers.choice = Choice.always("small" if count % 3 else "large")
        x = torch.full((size // (1 + 9 * (count % 2)) + 1,), float(count % 50 + RANK), device="cuda")
        total = channel.all_reduce(x)
        wrong += (total != RANKS * (count % 50) + sum(range(RANKS))).sum()
    assert not int(wrong), f"rank {RANK}: {int(wrong)} wrong of {len(steps)} calls"


if __name__ == "__main__":
    begin_worker()
    cases: dict[str, Callable[[ProcessGroups, Channel], None]] = {
        "sums": sums, "pieces": pieces, "in_graphs": in_graphs, "many_calls": many_calls,
    }  # fmt: skip
    with torch.no_grad():
        groups = ProcessGroups.connect(Mesh.of(tp=RANKS), device="cuda", timeout_s=30, shared_memory="on")
        assert groups.transports == {"tp": "peer memory"}
        for case in sys.argv[1:]:
            started = time.monotonic()
            cases[case](groups, groups.channel("tp", node="test"))
            torch.cuda.synchronize()
            if RANK == 0:
                print(f"{case}: {time.monotonic() - started:.1f} s", flush=True)
        groups.close()
