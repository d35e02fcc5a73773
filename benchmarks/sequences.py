"""Tokens shared out over sp: bytes, work and time of each way of attention, and memory at its peak.

    bytes     what leaves a rank in one layer's attention, counted as it is sent, beside what the docs say
    work      pairs of query and key that the busiest rank's kernels were given, over the mean of all: 1 is even.
              Counted as they run, here and at 90 tokens a rank and more; and processor seconds, the least of the rounds
    time      of one attention, ring / gather and ring / ulysses: the ratio of the medians, above 1 the ring is slower
    peak      results alive at the same time in a rank's run of a whole text, of one rank over that at sp=n: n is ideal

Causal attention in float32, one thread per rank, gloo between processes; the ways take turns. On a machine with fewer
cores than ranks, times are those of ranks that take turns on them, and say nothing of how a ring hides behind work.

    python -m benchmarks.sequences [--ranks 4] [--tokens 2048] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.support.live_bytes import LiveBytes
from benchmarks.support.peers import build
from benchmarks.support.ranks import launch_ranks
from benchmarks.support.rounds import Ratio, take_turns
from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.engine import Engine
from runtime.ops.rows.sequence_attention import attend_over_ranks
from runtime.ops.rows.share_rows import take_rows
from runtime.processes.launch import begin_worker

WAYS = ("ring", "gather", "ulysses", "ring-ulysses")
HEADS, KV_HEADS, WIDTH = 8, 4, 64
SIZES = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1024, "vocab_size": 256,
}  # fmt: skip


class Counting:
    """A channel that counts the bytes which leave this rank for others."""

    def __init__(self, channel: Any) -> None:
        self._channel, self.sent = channel, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def permute_begin(self, x: Tensor, shift: int) -> Any:
        self.sent += x.nbytes
        return self._channel.permute_begin(x, shift)

    def all_gather(self, x: Tensor, **options: Any) -> Tensor:
        self.sent += x.nbytes * (len(self.ranks) - 1)
        return self._channel.all_gather(x, **options)  # type: ignore[no-any-return]

    def all_to_all(self, x: Tensor, send_counts: Any = None, receive_counts: Any = None, **options: Any) -> Tensor:
        counts = list(send_counts)
        row = x.nbytes // max(x.shape[0], 1)
        self.sent += row * (sum(counts) - counts[self.coordinate])
        return self._channel.all_to_all(x, send_counts, receive_counts, **options)  # type: ignore[no-any-return]


class Pairs(TorchDispatchMode):
    """How many pairs of query and key the attention kernels were given, over all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            (batch, heads, queries, _), keys = args[0].shape, args[1].shape[2]
            is_causal = args[4] if len(args) > 4 else (kwargs or {}).get("is_causal", False)
            self.count += batch * heads * (queries * (queries + 1) // 2 if is_causal else queries * keys)
        return func(*args, **(kwargs or {}))


def said(way: str, ranks: int, tokens: int) -> float:
    """Numbers that leave a rank in one layer, as docs/parallelism/context_parallel.md has it."""
    own, pair = tokens / ranks, 2 * WIDTH
    if way in ("ring", "gather"):
        return (ranks - 1) * own * KV_HEADS * pair
    if way == "ulysses":
        return (ranks - 1) / ranks * own * (HEADS + max(KV_HEADS, ranks)) * pair
    u = ranks // 2
    kv = max(KV_HEADS, u)
    return (u - 1) / u * own * (HEADS + kv) * pair + (ranks // u - 1) * own * kv * pair


def everyone(mine: float) -> list[float]:
    found = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.tensor([mine], dtype=torch.float64))
    return [each.item() for each in found]


def own_parts(rank: int, ranks: int, tokens: int) -> list[Tensor]:
    """Queries, keys and values of a rank's own tokens."""
    random = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, heads, tokens, WIDTH, generator=random) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [take_rows(x, rank, parts=ranks, axes=("sp",), dim=2, kind="sequence", order="zigzag") for x in whole]


def attend(way: str, channel: Any, mine: list[Tensor], ranks: int, tokens: int) -> Tensor:
    options = {"neighbours": ranks // 2} if way == "ring-ulysses" else {}
    return attend_over_ranks(
        channel, *mine, tokens, None, None, how=way, parts=ranks, scale=WIDTH**-0.5, causal=True, **options
    )


def uneven(of_ranks: list[float]) -> float:
    """The busiest over the mean."""
    return max(of_ranks) / statistics.mean(of_ranks)


def pairs(way: str, channel: Any, ranks: int, tokens: int) -> list[float]:
    """Of each rank, in one attention over `tokens`."""
    with Pairs() as seen:
        attend(way, channel, own_parts(channel.coordinate, ranks, tokens), ranks, tokens)
    return everyone(float(seen.count))


def attentions(communicator: ProcessGroups, ranks: int, tokens: int, rounds: int) -> None:
    mine = own_parts(communicator.rank, ranks, tokens)
    ways = [way for way in WAYS if way != "ring-ulysses" or (ranks % 2 == 0 and ranks > 2)]
    channels = {way: Counting(communicator.channel("sp", node=way)) for way in ways}
    results, busy, even, shortest = {}, {}, {}, {}
    from_90 = [90 * ranks + more for more in range(2 * ranks + 1)] + [333 * ranks + 1]
    for way in ways:
        results[way] = attend(way, channels[way], mine, ranks, tokens)  # warm
        channels[way].sent = 0
        spent = []
        for _ in range(rounds):
            dist.barrier()
            start = time.thread_time()
            attend(way, channels[way], mine, ranks, tokens)
            spent.append(time.thread_time() - start)
        channels[way].sent //= rounds
        busy[way] = uneven(everyone(min(spent)))
    sent = {way: max(everyone(float(channels[way].sent))) for way in ways}
    for way in ways:
        even[way] = uneven(pairs(way, channels[way], ranks, tokens))
        shortest[way] = max(uneven(pairs(way, channels[way], ranks, each)) for each in from_90)
    off = max(float((results[way] - results["ring"]).abs().max()) for way in ways)
    assert off < 1e-4, off
    times = take_turns(
        {way: lambda way=way: attend(way, channels[way], mine, ranks, tokens) for way in ways},
        rounds=rounds,
        meet=dist.barrier,
    )
    if communicator.rank == 0:
        print(f"{tokens} tokens on {ranks} ranks, {HEADS} heads, {KV_HEADS} kv heads of {WIDTH}, float32")
        for way in ways:
            wanted = 4 * said(way, ranks, tokens) / 2**20
            print(
                f"  {way:13s} {sent[way] / 2**20:7.2f} MiB leave a rank (said: {wanted:.2f}), work {even[way]:.4f} of "
                f"even, at most {shortest[way]:.4f} from {90 * ranks} tokens, processor {busy[way]:.2f}, "
                f"{statistics.median(times[way]) * 1e3:.1f} ms"
            )
        for way in ways[1:]:
            print(f"  ring / {way}: {Ratio.of(times['ring'], times[way])}", flush=True)


def peak(plan: Plan, tokens: int) -> float:
    """Of the rank that has most, in a run of a whole text."""
    model = build(SIZES)
    ids = torch.randint(3, 200, (1, tokens), generator=torch.Generator().manual_seed(1))
    with Engine.connect(partition(model, plan), timeout_s=120) as engine, LiveBytes() as seen:
        hidden = engine(input_ids=ids)
    del hidden
    return float(seen.most)


def worker(tokens: int, rounds: int, alone: float) -> None:
    begin_worker()
    ranks = int(os.environ["WORLD_SIZE"])
    if alone:
        found = {}
        for way in ("ring", "gather", "ulysses"):
            mine = peak(Plan(sp=ranks, sp_attention=way), tokens)
            found[way] = mine
        if int(os.environ["RANK"]) == 0:
            for way, most in found.items():
                print(
                    f"  {way:13s} peak {most / 2**20:.1f} MiB, one rank has {alone / most:.2f} times that (sp={ranks})"
                )
        return
    communicator = ProcessGroups.connect(Mesh.of(sp=ranks), axes={("sp",)}, device="cpu", timeout_s=120.0)
    attentions(communicator, ranks, tokens, rounds)
    communicator.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", type=float, default=0.0, help="bytes of one rank's peak: only that is compared")
    given = parser.parse_args()
    if "RANK" in os.environ:
        worker(given.tokens, given.rounds, given.alone)
        return
    launch_ranks(["benchmarks.sequences", *sys.argv[1:]], num_ranks=given.ranks, timeout_s=600)
    model = build(SIZES)
    ids = torch.randint(3, 200, (1, given.tokens), generator=torch.Generator().manual_seed(1))
    parts = partition(model, Plan())
    parts.simulate(input_ids=ids[:, :8])
    engine = parts._simulators[0].engines[0]
    with LiveBytes() as seen:
        engine(input_ids=ids)
    print(f"a whole text of {given.tokens} tokens, one rank: peak {seen.most / 2**20:.1f} MiB", flush=True)
    launch_ranks(["benchmarks.sequences", *sys.argv[1:], f"--alone={seen.most}"], num_ranks=given.ranks, timeout_s=600)


if __name__ == "__main__":
    main()
