"""Routed experts over several GPUs of one host, without attention: how tokens come to them, against transformers'.

    replicate     all ranks have all tokens: own experts, all-reduce
    gather        ranks have tokens of their own: all-gather, own experts, reduce-scatter
    exchange      ranks have tokens of their own: each token once to each rank that has one of its experts, and back
    auto          what `Plan(dp=n, ep=n)` takes for single tokens, and for prompts: one of these, named with its time
                  over that of the best: node by node of those for tokens of their own, in graphs of all three
    all_to_all, all_reduce    transformers' expert parallelism, where it runs; all_reduce is given all tokens
    1 GPU         a rank's own tokens through all experts, on one GPU

Two blocks, bfloat16, random weights and choices: Qwen3-30B-A3B's (128 experts, 8 of them, 2048 wide, 768 inside) and
one of DeepSeek-V3's size (256, 8, 7168, 2048). Calls run node by node, as prompts do, and in a CUDA graph, as steps of
single tokens do; the slowest rank counts, of the rounds the median. What each rank gets is compared with what one GPU
makes of its tokens. "exchange alike": among ranks that bring equally many tokens, without a wait of the host; it is the
one in graphs.
There and back (128 tokens per rank, experts left out), beside an all-reduce of as many bytes.
Overlap (4,096 tokens per rank): gather and exchange with a shared expert's first product during the way there and its
second during the way back, against one after the other: what share of the time there and back is hidden. What is
gathered goes by copy engines then. What GPUs exchange through each other's memory is not under way. Between two calls
GPUs rest there: at the limit of their power, clocks differ by more than what is to be seen.

    python -m benchmarks.gpu.experts --ranks 2
    python -m benchmarks.gpu.experts --ranks 2 --nccl
    python -m benchmarks.gpu.experts --ranks 2 --tokens 128 8192 --profile
    python -m benchmarks.gpu.experts --ranks 8 --blocks deepseek-v3 --layers 4
    python -m benchmarks.gpu.experts --ranks 2 --device cpu --small --rounds 2

`--layers` runs so many blocks with weights of their own behind each other, so that small sizes read them from memory.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.support.expert_parallel import theirs
from benchmarks.support.several import DeviceTurns, device_name, device_of_rank, options, sharing, start
from partitioner.analysis.cost.expert_exchange import OwnTokens
from partitioner.program.balance import deal
from partitioner.sharding.mesh import Mesh
from runtime.communication.peer_memory.measure import microseconds
from runtime.communication.process_groups import ProcessGroups
from runtime.execution.fusion.operations import gated
from runtime.ops.collectives import landed
from runtime.ops.expert_exchange import localise_experts, receive_from_experts, send_to_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear
from runtime.ops.rows.share_rows import collect, scatter

OURS = ("replicate", "gather", "exchange")
CHOICES, SMALL_BATCH, LARGE_BATCH = 8, 128, 4096
REST_S, FEWEST_ROUNDS = 0.015, 15
"""Of the overlap, a few hundredths of a block's time, which vary by 3% where the limit of power lowers clocks."""


@dataclass(frozen=True)
class Block:
    experts: int
    hidden: int
    inner: int


BLOCKS = {
    "qwen3-30b-a3b": Block(128, 2048, 768),
    "deepseek-v3": Block(256, 7168, 2048),
}
SMALL = {"small": Block(24, 32, 16), "uneven": Block(19, 32, 16)}
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)


def experts(hidden: Tensor, index: Tensor, gates: Tensor, up: Tensor, down: Tensor, *, trim: bool = False) -> Tensor:
    rows, order, counts = expert_dispatch(hidden, index, up.shape[0], trim=trim)
    gate, value = grouped_linear(rows, up, counts).chunk(2, dim=-1)
    return expert_combine(grouped_linear(gated(gate, value, "silu"), down, counts), order, gates)


class Layer:
    """One block: all its experts, those of this rank, and every way to them. tokens: (hidden, index, gates)."""

    def __init__(self, block: Block, communicator: ProcessGroups, number: int, dtype: torch.dtype) -> None:
        rank, ranks, device = communicator.rank, communicator.mesh.size("ep"), communicator.device
        random = torch.Generator(device).manual_seed(number)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype, generator=random) * shape[-1] ** -0.5

        self.up = draw(block.experts, 2 * block.inner, block.hidden)
        self.down = draw(block.experts, block.hidden, block.inner)
        owners = deal(block.experts, ranks)
        mine = slice(owners[rank][0], owners[rank][-1] + 1)
        self.own_up, self.own_down = self.up[mine], self.down[mine]
        self.dealt: dict[str, Any] = {
            "experts": [expert for of_rank in owners for expert in of_rank],
            "counts": [len(of_rank) for of_rank in owners],
        }
        self.rank = rank
        self.channel = {
            name: communicator.channel("ep", node=f"{name} {number}")
            for name in ("send", "return", "gather", "index", "gates", "scatter", "reduce")
        }

    def whole(self, tokens: list[Tensor]) -> Tensor:
        return experts(*tokens, self.up, self.down)  # type: ignore[misc]

    def local(self, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """A partial sum: of this rank's experts."""
        index, gates = localise_experts(index, gates, self.rank, axes=("ep",), **self.dealt)
        return experts(hidden, index, gates, self.own_up, self.own_down)

    def replicate(self, everyone: list[Tensor]) -> Tensor:
        return self.channel["reduce"].all_reduce(self.local(*everyone))

    def gather(self, own: list[Tensor]) -> Tensor:
        return self.scattered(self.local(*self.gathered(own)))

    def gathered(self, own: list[Tensor]) -> list[Tensor]:
        return [self.channel[name].all_gather(x, 0) for name, x in zip(("gather", "index", "gates"), own, strict=True)]

    def scattered(self, everyone: Tensor) -> Tensor:
        return self.channel["scatter"].reduce_scatter(everyone, 0)

    def exchange(self, own: list[Tensor], *, alike: bool = False) -> Tensor:
        """`alike`: without that the host waits for numbers."""
        *sent, back = send_to_experts(self.channel["send"], *own, **self.dealt, alike=alike)  # type: ignore[misc]
        return receive_from_experts(self.channel["return"], experts(*sent, self.own_up, self.own_down, trim=True), back)

    def exchange_alike(self, own: list[Tensor]) -> Tensor:
        return self.exchange(own, alike=True)

    def there_and_back(self, own: list[Tensor], *, alike: bool = False) -> Tensor:
        rows, _, _, back = send_to_experts(self.channel["send"], *own, **self.dealt, alike=alike)  # type: ignore[misc]
        return receive_from_experts(self.channel["return"], rows, back)

    def with_shared(self, own: list[Tensor], up: Tensor, down: Tensor, *, ahead: bool) -> Tensor:
        """`exchange`, and a shared expert of all tokens; ahead: while rows are on their way."""
        *sent, back = send_to_experts(self.channel["send"], *own, **self.dealt, ahead=ahead, alike=True)  # type: ignore[misc]
        gate, value = functional.linear(own[0], up).chunk(2, dim=-1)
        made = experts(*map(landed, sent), self.own_up, self.own_down, trim=True)
        coming = receive_from_experts(self.channel["return"], made, back, ahead=ahead)
        shared = functional.linear(gated(gate, value, "silu"), down)
        return landed(coming) + shared

    def gathered_with_shared(self, own: list[Tensor], up: Tensor, down: Tensor, *, ahead: bool) -> Tensor:
        """The same of `gather`."""
        total = own[0].shape[0] * len(self.dealt["counts"])
        chosen = [self.channel[name].all_gather(x, 0) for name, x in zip(("index", "gates"), own[1:], strict=True)]
        hidden = collect(self.channel["gather"], own[0], total, dim=0, ahead=ahead)
        gate, value = functional.linear(own[0], up).chunk(2, dim=-1)
        made = self.local(landed(hidden), *chosen)
        coming = scatter(self.channel["scatter"], made, dim=0, kind="batch", ahead=ahead)
        shared = functional.linear(gated(gate, value, "silu"), down)
        return landed(coming) + shared

    def gathered_and_back(self, own: list[Tensor]) -> Tensor:
        return self.scattered(self.gathered(own)[0])


def of_auto(ranks: int, block: Block) -> dict[str, str]:
    """By entry, what the pass takes where each rank has sequences of its own."""
    layer = OwnTokens(ranks, ranks, block.experts, CHOICES, block.hidden * torch.bfloat16.itemsize)
    return {"decode": "gather", "prefill": layer.cheapest()}


def through(layers: list[Callable[[Tensor], Tensor]], hidden: Tensor) -> Callable[[], Tensor]:
    """Blocks behind each other, each with a residual."""

    def run() -> Tensor:
        x = hidden
        for layer in layers:
            x = x + layer(x)
        return x

    return run


@torch.no_grad()
def rank(given: argparse.Namespace) -> None:
    device, block = device_of_rank(given), (SMALL if given.small else BLOCKS)[given.part]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    communicator = ProcessGroups.connect(
        Mesh.of(dp=given.ranks, ep=given.ranks), axes={("ep",)}, device=device.type, timeout_s=120,
        shared_memory="off" if given.nccl else sharing(device),
    )  # fmt: skip
    turns, first = DeviceTurns(device), communicator.rank == 0
    layers = [Layer(block, communicator, number, dtype) for number in range(given.layers)]
    others = [
        theirs((layer.own_up, layer.own_down), device, given.ranks, num_experts=block.experts, choices=CHOICES)
        for layer in layers
    ]
    auto = of_auto(given.ranks, block)
    if first:
        print(f"{given.part}: {given.ranks} x {device_name(device)}, {given.layers} blocks, {block}", flush=True)
        if others[0][1]:
            print(f"  left out: transformers' ways: {others[0][1][:200]}")
    for count in given.tokens or ((1, 5, 32) if given.small else TOKENS):
        everyone = drawn(block, count * given.ranks, device, dtype)
        own = [x[communicator.rank * count :][:count] for x in everyone]
        ways = {
            "replicate": run_through([layer.replicate for layer in layers], everyone),
            "gather": run_through([layer.gather for layer in layers], own),
            "exchange": run_through([layer.exchange for layer in layers], own),
            "exchange alike": run_through([layer.exchange_alike for layer in layers], own),
            "1 GPU": run_through([layer.whole for layer in layers], own),
        }
        for name in others[0][0]:
            tokens = everyone if name == "all_reduce" else own
            made = [lambda x, way=kinds[name], t=tokens: way(x, t[1], t[2]) for kinds, _ in others]
            ways[name] = through(made, tokens[0])
        mine = compared(ways, communicator.rank, count)
        off = dict(zip(mine, turns.slowest(list(mine.values())), strict=True))
        wrong = [name for name, each in off.items() if each > (1e-4 if dtype == torch.float32 else 5e-2)]
        assert not set(wrong) & {*OURS, "exchange alike"}, off
        if wrong and first:  # rows that nobody has written, on a CPU now and then: the work is the same
            print(f"  {count} tokens per rank: other numbers by transformers' {', '.join(wrong)}, timed all the same")
        times = turns.medians(ways, rounds=given.rounds, calls=1 if given.small else 10)
        best = min(times[name] for name in OURS)
        of_own = min(times["gather"], times["exchange"])
        if first:
            said = ", ".join(f"{name} {seconds * 1e6 / given.layers:.0f}" for name, seconds in times.items())
            chosen = ", ".join(f"{entry} {way} {times[way] / of_own:.2f} of the best" for entry, way in auto.items())
            worst = max(off[name] for name in OURS)
            print(f"  {count} tokens per rank, us a block: {said}; auto: {chosen}; off by {worst:.1e}", flush=True)
            for name in others[0][0]:
                print(f"    {name} / best of ours {times[name] / best:.2f}", flush=True)
        if device.type == "cuda":
            in_graphs(ways, turns, given.layers, count, auto, first=first)
            if given.profile:
                for name in (*OURS, "exchange alike", "1 GPU"):
                    profiled(name, ways[name], first=first)
    there_and_back(given, turns, layers[0], block, dtype, first=first)
    overlap(given, turns, layers[0], block, dtype, first=first)
    communicator.close()


def run_through(blocks: list[Callable[[list[Tensor]], Tensor]], tokens: list[Tensor]) -> Callable[[], Tensor]:
    hidden, index, gates = tokens
    return through([lambda x, block=block: block([x, index, gates]) for block in blocks], hidden)  # type: ignore[misc]


def drawn(block: Block, count: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator(device).manual_seed(count)
    hidden = torch.randn(count, block.hidden, device=device, dtype=dtype, generator=random)
    gates, index = torch.rand(count, block.experts, device=device, generator=random).topk(CHOICES)
    return [hidden, index, (gates / gates.sum(-1, keepdim=True)).to(dtype)]


def compared(ways: dict[str, Callable[[], Tensor]], number: int, count: int) -> dict[str, float]:
    """By way, the largest difference from one GPU, over the largest number; infinite where there is none."""
    whole = ways["1 GPU"]().double()
    off = {}
    for name, run in ways.items():
        found = run().double()
        found = found[number * count :][:count] if found.shape != whole.shape else found
        largest = float((found - whole).abs().max() / whole.abs().max())
        off[name] = largest if math.isfinite(largest) else math.inf
    return off


def in_graphs(
    ways: dict[str, Callable[[], Tensor]],
    turns: DeviceTurns,
    layers: int,
    count: int,
    auto: dict[str, str],
    *,
    first: bool,
) -> None:
    """The same in a CUDA graph, as steps of single tokens run; ranks that bring alike exchange without a wait."""
    chosen = {"exchange": ways["exchange alike"], **{name: ways[name] for name in ("replicate", "gather", "1 GPU")}}
    mine = microseconds(chosen, turns.device, calls=max(1, min(10, 2048 // count)), rounds=5)
    times = dict(zip(mine, turns.slowest(list(mine.values())), strict=True))
    if first:
        best, way = min(times[name] for name in OURS), auto["decode"]
        said = ", ".join(f"{name} {took / layers:.1f}" for name, took in times.items())
        print(f"    in a CUDA graph: {said}; auto: decode {way} {times[way] / best:.2f} of the best", flush=True)


def profiled(name: str, run: Callable[[], Tensor], *, first: bool) -> None:
    """Where the time of one call goes: launches, waits of the host, and the kernels that take longest."""
    calls = 3
    with torch.profiler.profile() as profile:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    if not first:
        return
    on_device: dict[str, list[float]] = {}
    on_host: dict[str, list[float]] = {}
    for event in profile.events():
        kept = on_device if event.device_type == torch.autograd.DeviceType.CUDA else on_host
        each = kept.setdefault(event.name, [0, 0.0])
        each[0] += 1
        each[1] += event.time_range.elapsed_us() if kept is on_device else event.self_cpu_time_total
    launches = sum(count for count, _ in on_device.values()) / calls
    waits = sum(count for key, (count, _) in on_host.items() if "ynchronize" in key or "_local_scalar" in key) / calls
    total = sum(took for _, took in on_device.values()) / calls
    print(f"    {name}: {launches:.0f} kernels and copies, {waits:.0f} waits, {total:.0f} us on the device", flush=True)
    for kind, kept in (("device", on_device), ("host", on_host)):
        for key, (count, took) in sorted(kept.items(), key=lambda item: -item[1][1])[:16]:
            print(f"      {kind} {took / calls:8.1f} us {count / calls:5.1f} x {key[:90]}", flush=True)


def there_and_back(
    given: argparse.Namespace, turns: DeviceTurns, layer: Layer, block: Block, dtype: torch.dtype, *, first: bool
) -> None:
    """Dispatch and combine without experts."""
    count = 4 if given.small else SMALL_BATCH
    everyone = drawn(block, count * given.ranks, turns.device, dtype)
    own = [x[layer.rank * count :][:count] for x in everyone]
    ways = {
        "exchange": lambda: layer.there_and_back(own),
        "gather": lambda: layer.gathered_and_back(own),
        "all-reduce": lambda: layer.channel["reduce"].all_reduce(everyone[0]),
    }
    times = turns.medians(ways, rounds=given.rounds, calls=1 if given.small else 20)
    captured: dict[str, float] = {}
    if turns.device.type == "cuda":
        in_graph = {**ways, "exchange": lambda: layer.there_and_back(own, alike=True)}
        mine = microseconds(in_graph, turns.device, calls=20, rounds=11)
        captured = dict(zip(mine, turns.slowest(list(mine.values())), strict=True))
    if first:
        said = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in times.items())
        graphs = ", ".join(f"{name} {took:.1f}" for name, took in captured.items()) or "no GPU"
        print(f"  there and back, {count} tokens per rank, us: {said}; in a CUDA graph: {graphs}", flush=True)


def overlap(
    given: argparse.Namespace, turns: DeviceTurns, layer: Layer, block: Block, dtype: torch.dtype, *, first: bool
) -> None:
    count = 4 if given.small else LARGE_BATCH
    own = [x[layer.rank * count :][:count] for x in drawn(block, count * given.ranks, turns.device, dtype)]
    up, down = layer.up[0], layer.down[0]  # as wide as a routed one
    # as prompts run: what is gathered needs no numbers on the host, what is exchanged waits for them unless alike
    overlapped(
        given, turns, "gather", layer.gathered_and_back, layer.gathered_with_shared, (own, up, down), first=first
    )
    if given.nccl or turns.device.type == "cpu":
        there = functools.partial(layer.there_and_back, alike=True)
        overlapped(given, turns, "exchange", there, layer.with_shared, (own, up, down), first=first)


def overlapped(
    given: argparse.Namespace,
    turns: DeviceTurns,
    name: str,
    there: Callable[[list[Tensor]], Tensor],
    whole: Callable[..., Tensor],
    tensors: tuple[list[Tensor], Tensor, Tensor],
    *,
    first: bool,
) -> None:
    ways: dict[str, Callable[[], Tensor]] = {
        "there and back": lambda: there(tensors[0]),
        "one after the other": lambda: whole(*tensors, ahead=False),
        "ahead": lambda: whole(*tensors, ahead=True),
    }
    off = float((ways["ahead"]() - ways["one after the other"]()).abs().max())
    assert off < (1e-4 if tensors[1].dtype == torch.float32 else 5e-2), off
    rounds = max(given.rounds, FEWEST_ROUNDS) if turns.device.type == "cuda" else given.rounds
    times = turns.queued_medians(ways, rounds=rounds, calls=2, rest_s=REST_S)
    found = {"node by node": {way: seconds * 1e6 for way, seconds in times.items()}}
    if turns.device.type == "cuda":
        captured = microseconds(ways, turns.device, calls=1, rounds=rounds, rest_s=REST_S)
        found["in a CUDA graph"] = dict(zip(captured, turns.slowest(list(captured.values())), strict=True))
    for how, took in found.items():
        if first:
            said = ", ".join(f"{way} {each:.0f}" for way, each in took.items())
            hidden = (took["one after the other"] - took["ahead"]) / took["there and back"]
            count = tensors[0][0].shape[0]
            print(
                f"  with a shared expert, {count} tokens per rank, {name}, {how}, us: {said}; hidden {hidden:.0%}",
                flush=True,
            )
    if given.profile and turns.device.type == "cuda":
        profiled(f"{name} ahead", ways["ahead"], first=first)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=1, help="blocks behind each other")
    parser.add_argument("--nccl", action="store_true", help="not through each other's memory; gloo on CPU")
    parser.add_argument("--profile", action="store_true", help="which kernels take how long")
    parser.add_argument("--tokens", type=int, nargs="+", help="per rank; 1 to 8192, and 1 to 32 with --small")
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=["qwen3-30b-a3b", "deepseek-v3"])
    given = parser.parse_args()
    start("benchmarks.gpu.experts", given, parts=list(SMALL) if given.small else given.blocks, rank=rank)


if __name__ == "__main__":
    main()
