"""One rank with a GPU of its own: `python -P -m tests.gpu.peer_rank CASE ...`; started by test_peer_memory.py."""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import Channel, Handle, OwnRows
from runtime.communication.peer_memory import async_collectives
from runtime.communication.peer_memory.choice import Choice, Way
from runtime.communication.process_groups import ProcessGroups
from runtime.ops.attention import attention
from runtime.ops.collectives import landed
from runtime.ops.expert_exchange import receive_from_experts, send_to_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear
from runtime.ops.rows.partial_attention import merge_parts, with_sinks
from runtime.ops.rows.sequence_attention import attend_over_ranks
from runtime.ops.rows.token_order import TokenOrder
from runtime.processes.launch import begin_worker
from tests.gpu.peer_cases import Case, brought, exchanges, pieces, summed
from tests.gpu.peer_cases import sums as all_sums

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
WAYS: tuple[Way, ...] = ("small", "large", "in two")


def ways(groups: ProcessGroups) -> Iterator[Way]:
    (peers,) = groups.peers.values()
    for way in WAYS:
        peers.choice = Choice.always(way)
        yield way


def run(channel: Channel, case: Case, how: str) -> None:
    x = case.brought[RANK]
    before = x.clone()
    operands = case.operands[RANK] if case.operands else ()
    found = channel.prepare(case.kind, **case.options)(x, *operands)
    case.check(RANK, found.finish() if isinstance(found, Handle) else found, how)
    assert case.options.get("overwrite") or torch.equal(x, before), f"{case} has written over what was brought"


def primitives(groups: ProcessGroups, channel: Channel) -> None:
    for way in ways(groups):
        for cases in (all_sums(RANKS), pieces(RANKS), exchanges(RANKS)):
            for case in cases:
                run(channel, case, way)


def counts_on_the_device(groups: ProcessGroups, channel: Channel) -> None:
    (peers,) = groups.peers.values()
    for case in exchanges(RANKS):
        x, expected = case.brought[RANK], case.expected[RANK]
        room = torch.full((expected.shape[0] + 9, x.shape[1]), 7.0, dtype=x.dtype, device="cuda")
        sent, received = torch.tensor(case.operands[RANK], device="cuda")
        case.check(RANK, peers.all_to_all(x, room, sent, received)[:-9], "counts on the device")
        assert (room[-9:] == 7).all()


def in_graphs(groups: ProcessGroups, channel: Channel) -> None:
    """Captured calls are new calls whenever they are replayed, between others of other sizes."""
    sizes = (1, 4096, 70_000, 2_000_000)
    for way in ways(groups):
        inputs = [torch.zeros(size, dtype=torch.bfloat16, device="cuda") for size in sizes]
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for x in inputs:
                channel.all_reduce(x)
                channel.all_gather(x, 0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [channel.all_reduce(x) for x in inputs] + [channel.all_gather(x, 0) for x in inputs]
        for seed in range(20):
            parts = [[brought(rank, (size,), torch.bfloat16, seed) for rank in range(RANKS)] for size in sizes]
            for x, part in zip(inputs, parts, strict=True):
                x.copy_(part[RANK])
            for result in results:
                result.fill_(float("nan"))
            if seed % 3 == RANK:
                time.sleep(0.01)  # one comes late
            graph.replay()
            expected = [summed(part) for part in parts] + [torch.cat(part) for part in parts]
            for found, wanted in zip(results, expected, strict=True):
                assert torch.equal(found, wanted), f"rank {RANK}, {way}, replay {seed}, {wanted.numel()} elements"
            assert torch.equal(channel.all_reduce(inputs[1]), expected[1]), "between replays"
        graph.reset()


def many_calls(groups: ProcessGroups, channel: Channel) -> None:
    """Thousands in turn, of changing sizes, without waiting between them: no slot is written before it is read."""
    (peers,) = groups.peers.values()
    steps = torch.randint(1, 400_000, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for count, size in enumerate(steps):
        peers.choice = Choice.always("small" if count % 3 else "large")
        x = torch.full((size // (1 + 9 * (count % 2)) + 1,), float(count % 50 + RANK), device="cuda")
        wrong += (channel.all_reduce(x) != RANKS * (count % 50) + sum(range(RANKS))).sum()
    assert not int(wrong), f"rank {RANK}: {int(wrong)} wrong of {len(steps)} calls"


def beside_others(groups: ProcessGroups, channel: Channel) -> None:
    """All-reduces that are under way, with products and other collectives between their begins and their ends."""
    (peers,) = groups.peers.values()
    wide = torch.randn(2048, 2048, device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    sizes = torch.randint(1, 3_000_000, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for way in (*WAYS, "nccl"):
        peers.choice = Choice.always(way)  # type: ignore[arg-type]
        for count, size in enumerate(sizes):
            begun = []
            for each in range(2):
                x = torch.full((size,), float(count % 50 + RANK + each), device="cuda")
                begun.append(channel.all_reduce_begin(x, overwrite=bool(count % 2)))
                del x
                wide = wide @ wide / 50
            if count % 3 == 0:
                gathered = channel.all_gather(torch.full((count + 1,), float(RANK), device="cuda"), 0)
                wrong += (gathered != torch.arange(RANKS, device="cuda").repeat_interleave(count + 1)).sum()
            for each, handle in enumerate(begun):
                wrong += (handle.finish() != RANKS * (count % 50 + each) + sum(range(RANKS))).sum()
        assert not int(wrong), f"rank {RANK}, {way}: {int(wrong)} wrong"


def rows_beside_others(groups: ProcessGroups, channel: Channel) -> None:
    """Sums with their norms by rows, as they are and captured, with products and other collectives between."""
    for dtype, close in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        for shape in ((1, 1023, 4096), (2, 700, 2880), (1, 9001, 8192)):
            rows_of(channel, shape, dtype, close)


def rows_of(channel: Channel, shape: tuple[int, ...], dtype: torch.dtype, close: float) -> None:
    wide = torch.randn(2048, 2048, device="cuda")
    weight, residual = brought(0, shape[-1:], dtype, 9), brought(0, shape, dtype, 8)
    share = OwnRows.share(shape[0] * shape[1], RANKS, RANK)
    inputs = [torch.empty_like(residual) for _ in range(2)]

    def twice() -> list[torch.Tensor]:
        first = channel.sum_norm_begin(inputs[0], residual, weight, 1e-5)
        assert first is not None
        wide @ wide
        total, one = first()
        gathered = channel.all_gather(torch.full((3,), float(RANK), device="cuda"), 0)
        second = channel.sum_norm_begin(inputs[1], total, None, 1e-5)
        assert second is not None
        ones = channel.all_reduce(torch.ones(5, device="cuda"))
        last, two = second()
        return [total.rows, one, last.rows, two, gathered, ones]

    def check(found: list[torch.Tensor], parts: list[list[torch.Tensor]], how: str) -> None:
        total = residual.double()
        for count, scale in ((0, weight.double()), (1, torch.ones_like(weight, dtype=torch.float64))):
            total = total + torch.stack([part.double() for part in parts[count]]).sum(0)
            normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * scale
            for got, wanted in ((found[2 * count], total.view(-1, shape[-1])[share]), (found[2 * count + 1], normed)):
                worst = (got.double() - wanted).abs().max() / wanted.abs().max()
                assert worst < close, f"rank {RANK}, {how}, {dtype} {shape}, sum {count}: {worst:.2g}"
        assert torch.equal(found[4], torch.arange(RANKS, device="cuda").repeat_interleave(3).float()), how
        assert (found[5] == RANKS).all(), how

    def bring(seed: int) -> list[list[torch.Tensor]]:
        parts = [[brought(rank, shape, dtype, seed + 50 * count) for rank in range(RANKS)] for count in range(2)]
        for x, part in zip(inputs, parts, strict=True):
            x.copy_(part[RANK])
        return parts

    for seed in range(3):
        parts = bring(seed)
        check(twice(), parts, "as it is")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = twice()
    for seed in range(10):
        parts = bring(20 + seed)
        if seed % 3 == RANK:
            time.sleep(0.01)  # one comes late
        graph.replay()
        check(results, parts, f"replay {seed}")
    graph.reset()


def few_rows_with_norms(groups: ProcessGroups, channel: Channel) -> None:
    """Sums of few rows with their norms, between others that take the same words, captured, and one rank late."""
    (peers,) = groups.peers.values()
    peers.choice = Choice.always("small")
    for dtype, shape in itertools.product((torch.bfloat16, torch.float16), [(1, 1, 4096), (32, 1, 4096), (5, 1, 3072)]):
        few_rows_of(channel, shape, dtype)


def few_rows_of(channel: Channel, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    residual, weight = brought(0, shape, dtype, 8), brought(0, shape[-1:], dtype, 9)
    parts = [brought(rank, shape, dtype, 7) for rank in range(RANKS)]
    x, sums = parts[RANK].clone(), summed(parts)
    assert channel.sum_norm(x.float(), residual, weight, 1e-5) is None
    assert channel.sum_added(x.float(), residual) is None

    def thrice() -> list[torch.Tensor]:
        first = channel.sum_norm(x, residual, weight, 1e-5)
        plain = channel.all_reduce(x)
        second = channel.sum_norm(plain, residual, None, 1e-5)
        added = channel.sum_added(x, residual)
        assert first is not None
        assert second is not None
        assert added is not None
        return [plain, *first, *second, added]

    def check(found: list[torch.Tensor], how: str) -> None:
        assert torch.equal(found[0], sums), how
        exact = torch.stack([part.double() for part in parts]).sum(0)
        torch.testing.assert_close(found[5].double(), exact + residual.double(), rtol=2**-8, atol=2**-8)
        for at, (total, scale) in enumerate(((exact, weight.double()), (RANKS * sums.double(), None))):
            got, normed = (each.double() for each in found[2 * at + 1 : 2 * at + 3])
            torch.testing.assert_close(got, total + residual.double(), rtol=2**-7, atol=2**-6)
            wanted = got * torch.rsqrt(got.square().mean(-1, keepdim=True) + 1e-5)
            torch.testing.assert_close(normed, wanted if scale is None else wanted * scale, rtol=2**-7, atol=2**-7)

    check(thrice(), "as it is")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = thrice()
    graph.replay()
    first = [result.clone() for result in results]
    check(first, "replayed")
    for seed in range(100):
        if seed % 5 == RANK:
            torch.cuda._sleep(100_000)  # type: ignore[no-untyped-call]
        graph.replay()
        assert all(map(torch.equal, results, first)), f"rank {RANK}, {dtype} {shape}, replay {seed}"
    graph.reset()


def heads_in_place(groups: ProcessGroups, channel: Channel) -> None:
    """Heads exchanged for tokens and back, and rings, against one GPU."""
    for size, heads, kv, width in ((5, 4, 2, 64), (4099, 8 * RANKS, 2 * RANKS, 128), (16384, 4 * RANKS, RANKS, 128)):
        random = torch.Generator("cuda").manual_seed(size)
        whole = [
            torch.randn(1, count, size, width, generator=random, device="cuda").to(torch.bfloat16)
            for count in (heads, kv, kv)
        ]
        order = TokenOrder.of(size, RANKS)
        at = torch.tensor(order.positions(RANK), device="cuda")
        mine = [x[:, :, at] for x in whole]
        expected = attention(*(x.float() for x in whole), scale=0.1, causal=True)
        for how in ("ulysses", "ring", "gather"):
            for _ in range(3):  # the memory is used again
                found = attend_over_ranks(
                    channel, *mine, size, None, None, how=how, parts=RANKS, scale=0.1, causal=True
                )
                off = (found.float() - expected[:, :, at]).norm() / expected[:, :, at].norm()
                assert off < 1e-2, f"rank {RANK}, {how} of {size} tokens: off by {float(off):.2g}"
    assert groups.peers[tuple(range(RANKS))].rows is not None


def exchanged_experts(groups: ProcessGroups, channel: Channel) -> None:
    """Tokens that are sent to experts elsewhere: as on one rank, waited for or under way, and in a CUDA graph."""
    num_experts, width = 5 * RANKS - 1, 48
    ends = [number * num_experts // RANKS for number in range(RANKS + 1)]
    dealt = {"experts": range(num_experts), "counts": [end - start for start, end in itertools.pairwise(ends)]}
    weight = torch.randn(num_experts, width, width, device="cuda", generator=torch.Generator("cuda").manual_seed(0))

    def experts(hidden: Tensor, index: Tensor, gates: Tensor, own: Tensor) -> Tensor:
        rows, order, counts = expert_dispatch(hidden, index, own.shape[0], trim=True)
        return expert_combine(grouped_linear(rows, own, counts), order, gates)

    def through(tokens: list[Tensor], **how: bool) -> Tensor:
        *sent, back = send_to_experts(channel, *tokens, **dealt, **how)  # type: ignore[arg-type]
        made = experts(*map(landed, sent), weight[ends[RANK] : ends[RANK + 1]])  # type: ignore[arg-type, call-arg]
        return landed(receive_from_experts(channel, made, back, ahead=how.get("ahead", False)))

    def close(found: Tensor, tokens: list[Tensor]) -> None:
        """In float32 sums of so many terms, in whatever order, are off by no more than this."""
        hidden, index, gates = tokens
        exact = experts(hidden.double(), index, gates.double(), weight.double())
        terms = experts(hidden.double().abs(), index, gates.double().abs(), weight.double().abs())
        bound = (width + 3) * torch.finfo(torch.float32).eps * terms
        off = (found.double() - exact).abs()
        assert (off <= bound).all(), f"rank {RANK}: off by {off.max():.2g}, {(off - bound).max():.2g} above the bound"

    for count in (1, 7, 300, 0, 5000):
        random = torch.Generator("cuda").manual_seed(count * RANKS + RANK)
        gates, index = torch.rand(count, num_experts, device="cuda", generator=random).topk(3)
        tokens = [torch.randn(count, width, device="cuda", generator=random), index, gates]
        fewer = [x[: count // (RANK + 1)] for x in tokens]  # of each rank another number
        for how in ({}, {"ahead": True}):
            close(through(fewer, **how), fewer)
        close(through(tokens, alike=True), tokens)
        if count:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = through(tokens, alike=True)
            for _ in range(3):
                tokens[0] += 1
                graph.replay()
                close(found, tokens)
            graph.reset()


def copied_beside_others(groups: ProcessGroups, channel: Channel) -> None:
    """Pieces that copy engines bring, as they are and captured, with products and collectives between."""
    async_collectives.LEAST_BYTES = 0
    for dtype, shape in ((torch.bfloat16, (1031, 256)), (torch.float32, (7, 3)), (torch.bfloat16, (4096, 7168))):
        copied_of(channel, dtype, shape)


def copied_of(channel: Channel, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    wide = torch.randn(2048, 2048, device="cuda")
    own = torch.empty(shape, dtype=dtype, device="cuda")
    whole = torch.empty(RANKS * shape[0], shape[1], dtype=dtype, device="cuda")
    # of more than two a sum may be rounded in another order
    close = {"rtol": 8e-3 if RANKS > 2 and dtype == torch.bfloat16 else 1e-6, "atol": 1e-6}

    def both() -> list[Tensor]:
        there = channel.all_gather_begin(own, 0)
        assert there.into is not None
        assert not there.is_finished
        wide @ wide
        came = there.finish()
        back = channel.reduce_scatter_begin(whole, 0)
        ones = channel.all_reduce(torch.ones(5, device="cuda"))
        return [came.clone(), back.finish(), ones]

    def check(found: list[Tensor], seed: int, how: str) -> None:
        parts = [brought(rank, tuple(own.shape), dtype, seed) for rank in range(RANKS)]
        sums = [brought(rank, tuple(whole.shape), dtype, seed + 1) for rank in range(RANKS)]
        assert torch.equal(found[0], torch.cat(parts)), f"rank {RANK}, {how}: gathered {shape}"
        torch.testing.assert_close(found[1], summed(sums)[RANK * len(own) :][: len(own)], **close)
        assert (found[2] == RANKS).all(), how

    def bring(seed: int) -> None:
        own.copy_(brought(RANK, tuple(own.shape), dtype, seed))
        whole.copy_(brought(RANK, tuple(whole.shape), dtype, seed + 1))

    for seed in range(3):
        bring(seed)
        check(both(), seed, "as it is")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    for seed in range(10, 20):
        bring(seed)
        if seed % 3 == RANK:
            time.sleep(0.01)  # one comes late
        graph.replay()
        check(results, seed, f"replay {seed}")
    graph.reset()


def merged_parts(groups: ProcessGroups, channel: Channel) -> None:
    """Parts of an attention put together, as they are and captured, amid sums that share counters with them."""
    for shape, dtype, has_sinks in (
        ((1, 32, 1, 128), torch.bfloat16, False), ((4, 7, 1, 64), torch.float16, True),
        ((3, 5, 1, 33), torch.float32, True), ((2, 4, 1, 2), torch.float32, False),
        ((8, 32, 1, 256), torch.bfloat16, True),
    ):  # fmt: skip
        merged_of(channel, (*shape[:-1], shape[-1] + 1), dtype, has_sinks=has_sinks)


def merged_of(channel: Channel, shape: tuple[int, ...], dtype: torch.dtype, *, has_sinks: bool) -> None:
    parts = torch.empty(shape, device="cuda")
    sinks = brought(0, shape[1:2], torch.float32, 77) if has_sinks else None
    ones = torch.ones(300, device="cuda")

    def both() -> list[Tensor]:
        found = channel.merge_parts(parts, sinks, dtype)
        assert found is not None
        return [found, channel.all_reduce(ones)]

    def parts_of(rank: int, seed: int) -> Tensor:
        found = brought(rank, shape, torch.float32, seed)
        found[0, 0, :, -1] = -torch.inf  # nobody has any
        if rank == seed % RANKS:
            found[-1, ..., -1] = -torch.inf
            found[-1, ..., :-1] = 0
        return found

    def check(found: list[Tensor], seed: int, how: str) -> None:
        everyone = [parts_of(rank, seed) for rank in range(RANKS)]
        assert torch.equal(everyone[RANK], parts)
        whole = torch.stack(everyone)
        wanted = with_sinks(*merge_parts(whole[..., :-1], whole[..., -1]), sinks)
        wanted = torch.where(wanted.isnan(), 0, wanted)
        close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(found[0].float(), wanted.float(), rtol=close, atol=close, msg=f"{how}: {shape}")
        assert (found[1] == RANKS).all(), how
        bits = channel.all_gather(found[0].contiguous().view(torch.uint8)[None], 0)
        assert all(torch.equal(bits[0], each) for each in bits), f"{how}: ranks have other bits"

    for seed in range(3):
        parts.copy_(parts_of(RANK, seed))
        check(both(), seed, "as it is")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    for seed in range(10, 30):
        parts.copy_(parts_of(RANK, seed))
        if seed % 3 == RANK:
            time.sleep(0.01)  # one comes late
        graph.replay()
        check(results, seed, f"replay {seed}")
    without = torch.stack([brought(rank, shape, torch.float32, 29) for rank in range(RANKS) if rank])  # the control
    wrong, _ = merge_parts(without[..., :-1], without[..., -1])
    assert not torch.allclose(results[0].float(), wrong.float(), atol=0.1)
    graph.reset()


if __name__ == "__main__":
    begin_worker()
    all_cases: dict[str, Callable[[ProcessGroups, Channel], None]] = {
        "primitives": primitives,
        "counts_on_the_device": counts_on_the_device,
        "in_graphs": in_graphs,
        "many_calls": many_calls,
        "beside_others": beside_others,
        "rows_beside_others": rows_beside_others,
        "few_rows_with_norms": few_rows_with_norms,
        "heads_in_place": heads_in_place,
        "exchanged_experts": exchanged_experts,
        "copied_beside_others": copied_beside_others,
        "merged_parts": merged_parts,
    }
    with torch.no_grad():
        process_groups = ProcessGroups.connect(Mesh.of(tp=RANKS), device="cuda", timeout_s=30, shared_memory="on")
        assert process_groups.transports == {"tp": "peer memory"}
        for name in sys.argv[1:]:
            all_cases[name](process_groups, process_groups.channel("tp", node="test"))
            torch.cuda.synchronize()
        process_groups.close()
