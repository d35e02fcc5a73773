"""Tokens of one sequence shared out over several GPUs of one host (sp=n), a Llama-3-8B shape in bfloat16, against one.

    attention   one layer's, causal, 32k to 512k tokens, each kind: the time of the same kernel on one GPU over all
                tokens, divided by n, over the time here (1 is ideal); results are compared. Beside it what heads cost
                to exchange for tokens and back, without attention, and torch's context_parallel
    auto        of the kinds, the one that `sp_attention="auto"` takes: the best kind's time over its, for 12 shapes
                (query heads, kv heads, how wide) and lengths
    prompts     the whole model to the first token, 32k to 512k tokens, over one GPU (up to --alone tokens)
    decode      256k tokens in the cache: seconds of a token behind them, over one GPU, and of attention alone;
                captured, and with --compile compiled. Keys and values are drawn: of the prompt only the last 2,048
                tokens are run
    memory      a prompt of --cached tokens under a limit (`set_per_process_memory_fraction`) that ranks need a tenth
                less than: they run it, one GPU cannot

Weights are drawn on the devices. One GPU runs on each of them at the same time, in turn with the plan; the slowest rank
counts, of the rounds the median, and one round of what is longer than 128k tokens.

    python -m benchmarks.gpu.sequences --ranks 2
    python -m benchmarks.gpu.sequences --ranks 8 --parts attention decode --layers 8
    python -m benchmarks.gpu.sequences --ranks 4 --plan tp=2,sp=2 --parts prompts
    python -m benchmarks.gpu.sequences --ranks 2 --device cpu --small --rounds 1
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once

import torch
from torch import Tensor

from benchmarks.gpu.pipeline import alone, drawn_ids, writes
from benchmarks.gpu.sequence_cases import SharedOut, drawn_prompts, limited, torch_context_parallel
from benchmarks.support.decoders import SHAPES, DrawnWeights, decoder
from benchmarks.support.several import (
    DeviceTurns,
    device_name,
    device_of_rank,
    options,
    sharing,
    start,
    synchronize,
)
from partitioner import Plan, partition
from partitioner.analysis.cost.attention_exchange import Exchanged, cheapest
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.engine import Engine

PARTS = ("attention", "auto", "prompts", "decode", "memory")
WAYS = ("ring", "gather", "ulysses", "ring-ulysses")
LENGTHS, CACHED = (2**15, 2**16, 2**17, 2**18, 2**19), 2**18
AUTO = ((32, 8, 128), (64, 8, 128), (40, 8, 128), (32, 32, 128), (28, 4, 128), (16, 2, 128))
SMALL_AUTO = ((8, 4, 8), (4, 2, 16))
SMALL_LENGTHS, SMALL_CACHED = (96, 203), 200
NEW, LONG, LAST, SHORT = 33, 2**17, 2048, 512
"""Tokens behind a prompt, the longest that is timed several times, what is run of a drawn one, and a short one."""


def rounds_of(given: argparse.Namespace, tokens: int) -> int:
    return given.rounds if tokens <= LONG else 1  # type: ignore[no-any-return]


@torch.no_grad()
def attentions(given: argparse.Namespace, device: torch.device) -> None:
    """The attention part, and auto."""
    shape, ranks = SHAPES["small" if given.small else "8b"], given.ranks
    heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    heads = (*heads, shape["hidden_size"] // heads[0])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    communicator = ProcessGroups.connect(
        Mesh.of(sp=ranks), axes={("sp",)}, device=device.type, timeout_s=120, shared_memory=sharing(device)
    )
    turns, first = DeviceTurns(device), communicator.rank == 0
    ways = [way for way in WAYS if way != "ring-ulysses" or (ranks > 2 and ranks % 2 == 0)]
    channels = {way: communicator.channel("sp", node=way) for way in ways}
    if first:
        print(f"{given.part}: {ranks} x {device_name(device)}", flush=True)
    if given.part == "auto":
        shapes = SMALL_AUTO if given.small else AUTO
        lengths = given.lengths[:2]
        worst = 1.0
        for each, tokens in ((each, tokens) for each in shapes for tokens in lengths):
            case = SharedOut(communicator, channels, each, tokens, dtype)
            case.require_alike(ways)
            times = turns.medians({way: functools.partial(case.by, way) for way in ways}, rounds=given.rounds)
            how, _ = cheapest([Exchanged(*map(float, (*each, each[-1])))], ranks)
            best = min(times, key=times.__getitem__)
            worst = min(worst, times[best] / times[how])
            if first:
                said = ", ".join(f"{way} {seconds * 1e3:.2f} ms" for way, seconds in times.items())
                print(f"  {each} heads, {tokens} tokens: {said}; {best} / auto, {how}: {times[best] / times[how]:.3f}")
        if first:
            print(f"  of {len(shapes) * len(lengths)}, the worst: {worst:.3f}", flush=True)
        communicator.close()
        return
    for tokens in given.lengths:
        case = SharedOut(communicator, channels, heads, tokens, dtype)
        off = case.require_alike(ways)
        contestants: dict[str, Callable[[], object]] = {"1 GPU": case.alone, "exchange": case.exchanged}
        shared = {way: functools.partial(case.by, way) for way in ways}
        times = turns.medians(contestants | shared, rounds=rounds_of(given, tokens))
        if first:
            said = ", ".join(
                f"{way} {times[way] * 1e3:.2f} ms = {times['1 GPU'] / ranks / times[way]:.3f} of ideal"
                for way in shared
            )
            print(f"  {tokens} tokens: 1 GPU {times['1 GPU'] * 1e3:.2f} ms; {said}; off by {off:.1e}", flush=True)
            print(f"    heads for tokens and back, without attention: {times['exchange'] * 1e3:.3f} ms", flush=True)
        if device.type == "cuda":
            seconds, how = torch_context_parallel(turns, case.whole, case.scale, rounds_of(given, tokens))
            if first:
                ratio = f"{seconds * 1e3:.2f} ms = {times['1 GPU'] / ranks / seconds:.2f} of ideal" if seconds else "no"
                print(f"    torch's context_parallel: {ratio} ({how})", flush=True)
    communicator.close()


@torch.no_grad()
def whole_model(given: argparse.Namespace, device: torch.device) -> None:
    """Prompts, or decode."""
    is_decode, plan = given.part == "decode", Plan.parse(given.plan or f"sp={given.ranks}")
    cached = given.cached or (SMALL_CACHED if given.small else CACHED)
    shape, longest = "small" if given.small else "8b", max([cached] if is_decode else given.lengths)
    model = decoder(shape, layers=given.layers, positions=longest + 2 * NEW, device=device)
    weights, made = DrawnWeights(model, device), {}
    if is_decode and device.type == "cuda":
        made = {"compile": given.compile, "cuda_graph": True}
    one = alone(partition(model, Plan()), weights, device, **made)
    parts = partition(model, plan)
    with Engine.connect(
        parts, weights, device=device.type, timeout_s=300, shared_memory=sharing(device), **made
    ) as split:  # type: ignore[arg-type]
        turns, first = DeviceTurns(device), split.program.rank == 0
        if first:
            layers = model.config.num_hidden_layers
            print(f"{given.part}: {plan}, {given.ranks} x {device_name(device)}, {layers} layers", flush=True)
        if is_decode:
            layers, ids = model.config.num_hidden_layers, drawn_ids(1, cached, model.config.vocab_size, device)
            decode(turns, one, split, ids, layers=layers, first=first)
        else:
            for tokens in given.lengths:
                ids = drawn_ids(1, tokens, model.config.vocab_size, device)
                contestants = {"ranks": writes(split, ids, 1)}
                if tokens <= given.alone:
                    contestants["1 GPU"] = writes(one, ids, 1)
                times = turns.medians(contestants, rounds=rounds_of(given, tokens))
                if first:
                    ratio = f", 1 GPU / this {times['1 GPU'] / times['ranks']:.2f}" if "1 GPU" in times else ""
                    said = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in times.items())
                    print(f"  first token of {tokens}: {said}{ratio}", flush=True)
        synchronize(device)
        if made:
            one._generate_loop.release()  # what it has captured goes before the groups


def decode(turns: DeviceTurns, one: Engine, split: Engine, ids: Tensor, *, layers: int, first: bool) -> None:
    """The time between tokens behind one prompt, and behind the first of it; the first steps are captured, and do not
    count. What a long cache takes more than a short one is attention; what ranks take more than one GPU behind a short
    one is what they say to each other.
    """
    took = {}
    sizes = ids.shape[1], min(SHORT, ids.shape[1] // 4)
    for name, engine in (("1 GPU", one), ("ranks", split)):
        for size in sizes:
            turns.meet()
            ends = [time.perf_counter()]
            with drawn_prompts():
                steps = engine.stream(
                    ids[:, :size], max_new_tokens=NEW, eos_token_id=[], do_sample=False,
                    prefill_step=min(LAST, size // 8),
                )  # fmt: skip
                for _ in steps:
                    synchronize(turns.device)
                    ends.append(time.perf_counter())
            half = len(ends) // 2
            took[name, size] = turns.slowest([(ends[-1] - ends[half]) / (len(ends) - 1 - half)])[0]
    said = [
        writes(engine, ids[:, : min(SHORT, ids.shape[1] // 4)], NEW)()[0, -NEW:].tolist() for engine in (one, split)
    ]
    if not first:
        return
    alike = next((at for at, both in enumerate(zip(*said, strict=True)) if both[0] != both[1]), NEW)
    print(f"  of {NEW} tokens behind a prompt that is run, the first {alike} are one GPU's", flush=True)
    for (name, size), each in took.items():
        print(f"  {size} cached, {name}: {each * 1e3:.3f} ms a token")
    (alone_long, alone_short), (long, short) = ([took[name, size] for size in sizes] for name in ("1 GPU", "ranks"))
    attention = (alone_long - alone_short) / (long - short)
    more = (short - alone_short) / layers
    print(f"  1 GPU / ranks: a token {alone_long / long:.2f}, attention {attention:.2f}", flush=True)
    print(f"  besides attention ranks take {more * 1e6:.1f} us more a layer than one GPU", flush=True)


@torch.no_grad()
def memory(given: argparse.Namespace, device: torch.device) -> None:
    """What one GPU cannot run for want of memory."""
    plan = Plan.parse(given.plan or f"sp={given.ranks}")
    cached = given.cached or (SMALL_CACHED if given.small else CACHED)
    shape = "small" if given.small else "8b"
    model = decoder(shape, layers=given.layers, positions=cached + 2 * NEW, device=device)
    weights, whole, parts = DrawnWeights(model, device), partition(model, Plan()), partition(model, plan)
    ids = drawn_ids(1, cached, model.config.vocab_size, device)

    def run_alone() -> None:
        writes(alone(whole, weights, device), ids, 1)()

    def connected() -> Engine:
        return Engine.connect(parts, weights, device=device.type, timeout_s=300, shared_memory=sharing(device))

    with connected() as first:
        number, turns = first.program.rank, DeviceTurns(device)

        def run_split(engine: Engine = first) -> None:
            engine._generate_loop.release()
            writes(engine, ids, 1)()

        if device.type != "cuda":  # no limit is set on a host: that both run
            run_split()
            run_alone()
            if number == 0:
                print("memory: both run: on a host no limit is set", flush=True)
            return
        said = limited(turns, run_split, run_alone)
        if number == 0:
            print(f"memory: {plan}, {given.ranks} x {device_name(device)}, a prompt of {cached} tokens", flush=True)
            for line in said:
                print(f"  {line}", flush=True)


def rank(given: argparse.Namespace) -> None:
    device = device_of_rank(given)
    runs = {"attention": attentions, "auto": attentions, "memory": memory}
    runs.get(given.part, whole_model)(given, device)


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; 32k to 512k, and a few hundred with --small")
    parser.add_argument("--cached", type=int, help="tokens in the cache of decode; 256k, and 200 with --small")
    parser.add_argument("--alone", type=int, default=LONG, help="the longest prompt that one GPU is given")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--compile", action="store_true", help="compiled steps of decode, besides captured")
    parser.add_argument("--plan", help="of prompts and decode, instead of sp=RANKS")
    given = parser.parse_args()
    given.lengths = given.lengths or list(SMALL_LENGTHS if given.small else LENGTHS)
    start("benchmarks.gpu.sequences", given, parts=given.parts, rank=rank)


if __name__ == "__main__":
    main()
