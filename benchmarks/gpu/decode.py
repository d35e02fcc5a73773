"""One decoded token of a Llama-3-8B shape in bfloat16 on GPUs, against transformers and the memory's speed.

    ours                 tp=1: eager, CUDA graph with kernels of ours, torch.compile, and that in a CUDA graph
    transformers         generate: DynamicCache, eager; StaticCache, which it compiles

Random weights (they say nothing, and take as long). Time per token: the difference between generating 16 and 144 tokens
after a prompt of 128, over 128, the best of some rounds in which the contestants take turns. A decode step reads every
weight but the embedding's table once, and the cache: those bytes over the memory's speed are the limit. The speed is
measured by summing a large tensor, and is set against the data sheet's where the device is known.

On several GPUs (`--ranks`): tensor parallelism in captured steps, all-reduces by each other's memory and by NCCL; what
gpt-fast does (compiled by torch, NCCL, captured); and all of the model on each GPU. `--compiled` adds all of them
compiled. A round takes as long as on its slowest rank. Tokens are compared, of the rows the median counts. The limit is
a rank's bytes over the measured speed and one call of the quickest all-reduce of this run for each in a step.
`--shape 70b` is Llama-3-70B's: two GPUs hold it, and on four or eight each two run all of it besides (dp=2,tp=2 or
dp=4,tp=2), which is what they are set against.

    python -m benchmarks.gpu.decode                  about five minutes, most of it compiling
    python -m benchmarks.gpu.decode --layers 8       a part of the model
    python -m benchmarks.gpu.decode --ranks 2        two GPUs; 4, 8
    python -m benchmarks.gpu.decode --ranks 8 --shape 70b --batch 32
    python -m benchmarks.gpu.decode --ranks 4 --device cpu --small
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.pipeline import alone
from benchmarks.support.decoders import SHAPES, DrawnWeights, decoder
from benchmarks.support.several import DeviceTurns, device_name, device_of_rank, options, sharing, start
from benchmarks.support.single_tokens import LENGTHS, SMALL_LENGTHS, measured_speed, prompts, seconds
from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.peer_memory.choice import Choice
from runtime.communication.peer_memory.measure import candidates, microseconds
from runtime.communication.peer_memory.peer_memory import PeerMemory
from runtime.communication.process_groups import ProcessGroups
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.engine.engine import RankPrograms
from runtime.generation import steps
from runtime.ops.collectives import all_reduce
from runtime.ops.kernels.decode.few_rows import MOST_ROWS

COMPILED = "compiled by torch"
DATA_SHEET = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}
"""Bytes per second of the largest variant."""


def build(layers: int) -> Any:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--shape", choices=("8b", "70b"), default="8b", help="70b on several GPUs only")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="on several GPUs: all contestants, compiled besides")
    parser.add_argument("--captured", action="store_true", help="on several GPUs: none of which anything is compiled")
    parser.add_argument("--kernels", default="", help="a file for the kernels of 16 tokens of rank 0, by time")
    parser.set_defaults(ranks=1, timeout=1200.0)
    given = parser.parse_args()
    if given.ranks == 1 and given.shape != "8b":
        parser.error(f"--shape {given.shape} is for several GPUs: give --ranks 2, 4 or 8")
    if given.ranks == 1 and given.device == "cpu":
        parser.error("--device cpu is for several ranks: benchmarks/generation has what one CPU takes")
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    if given.ranks == 1:
        on_one(given)
    else:
        start("benchmarks.gpu.decode", given, parts=(f"tp={given.ranks}",), rank=on_several)


@dataclass(frozen=True)
class Contestant:
    """gpus: over which its weights are shared out. choice: of its all-reduces, while its steps are captured."""

    engine: Engine
    gpus: int
    choice: Choice | None = None
    compiled: bool = False


@torch.no_grad()
def on_several(given: argparse.Namespace) -> None:
    """One of several ranks: all take their turns together, and the slowest counts."""
    device, lengths = device_of_rank(given), SMALL_LENGTHS if given.small else LENGTHS
    model = decoder("small" if given.small else given.shape, layers=given.layers, positions=8192, device=device)
    ids = prompts(given.batch, lengths.prompt, model.config.vocab_size, str(device))
    contestants, parts = contestants_of(given, model, device)
    turns, several = DeviceTurns(device), f"{given.ranks} GPUs"
    first = contestants[several].engine
    rank, peers = first.program.rank, peers_of(first)

    def generates(engine: Engine) -> Callable[[int], Tensor]:
        return lambda count: engine.generate(ids, max_new_tokens=count, eos_token_id=[], do_sample=False)  # type: ignore[return-value]

    said = {}
    for name, each in contestants.items():
        if peers is not None and each.choice is not None:
            peers.choice = each.choice  # what is captured stays so
        steps.MOST_ROWS = 0 if each.compiled else MOST_ROWS
        began = time.perf_counter()
        said[name] = generates(each.engine)(lengths.many)
        generates(each.engine)(lengths.few)
        if rank == 0:
            print(f"warm: {name} ({time.perf_counter() - began:.0f} s)", flush=True)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(2 * given.rounds):
        for name, each in contestants.items():
            turns.meet()
            took = turns.slowest(
                [seconds(generates(each.engine), count, device) for count in (lengths.many, lengths.few)]
            )
            times[name].append((took[0] - took[1]) / (lengths.many - lengths.few))
    reduced = model.dtype.itemsize * model.config.hidden_size * given.batch
    ways = {}
    if peers is not None:
        peers.choice = contestants[several].choice
        ways = microseconds(candidates(peers, "all_reduce", reduced), peers.device, calls=100, rounds=11)
    speed = measured_speed(device)
    if rank == 0:
        reduces = sum(node.target is all_reduce for node in parts.entry("decode", rank).graph.nodes)
        quickest = min(ways, key=ways.__getitem__, default="")
        print(
            f"{given.ranks} x {device_name(device)}, {given.shape}{', small' * given.small}, "
            f"{model.config.num_hidden_layers} layers, batch {given.batch}; measured {speed / 1e12:.2f} TB/s; "
            f"{reduces} all-reduces of {reduced} bytes"
            + (f", the quickest {quickest} {ways[quickest]:.1f} us, NCCL {ways['nccl']:.1f} us" if ways else "")
        )
        weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
        middle = lengths.prompt + (lengths.few + lengths.many) // 2
        cache = partition(model, Plan()).cache_bytes(max_batch=given.batch, max_length=middle)[0]
        waited = reduces * ways[quickest] * 1e-6 if ways else 0.0
        of_all = (weights + cache) / speed
        limits = {1: of_all, given.ranks: of_all / given.ranks + waited}
        table(contestants, times, limits, {name: found[:, lengths.prompt :] for name, found in said.items()})
    if given.kernels:
        kernels(first, ids, given.kernels if rank == 0 else os.devnull)
    for each in contestants.values():
        if each.engine is not first and each.gpus in (1, given.ranks):
            each.engine._generate_loop.release()
        elif each.engine is not first:
            each.engine.close()
    first.close()


def peers_of(engine: Engine) -> PeerMemory | None:
    groups = engine.communicator
    assert isinstance(groups, ProcessGroups)
    return next(iter(groups.peers.values()), None)


def contestants_of(
    given: argparse.Namespace, model: Any, device: torch.device
) -> tuple[dict[str, Contestant], RankPrograms]:
    """By name, and the parts of the first; those that there is no room for are told."""
    several, captured = f"{given.ranks} GPUs", device.type == "cuda"
    drawn, parts, whole = DrawnWeights(model, device), partition(model, Plan(tp=given.ranks)), partition(model, Plan())
    first = Engine.connect(
        parts, drawn, device=device.type, cuda_graph=captured, timeout_s=600, shared_memory=sharing(device)
    )
    groups, peers, rank = first.communicator, peers_of(first), first.program.rank
    print(f"rank {rank}: {groups.transports}", flush=True)  # type: ignore[attr-defined]
    chosen = peers.choice if peers is not None else None
    found = {several: Contestant(first, given.ranks, chosen)}
    num_bytes = sum(p.nbytes for p in model.parameters())
    # a part of the weights for each contestant, and what runs need; reckoned, so that all ranks choose alike
    room = 0.8 * torch.cuda.get_device_properties(0).total_memory if captured else math.inf
    room -= num_bytes / given.ranks

    def enter(name: str, gpus: int, make: Callable[[], Engine], choice: Choice | None, compiled: bool = False) -> None:
        nonlocal room
        if num_bytes / gpus < room:
            room -= num_bytes / gpus
            found[name] = Contestant(make(), gpus, choice, compiled)
        elif rank == 0:
            print(f"left out: {name}: there is no room for its weights besides")

    def split(**how: bool) -> Engine:
        return Engine(
            parts.entry("text", rank), groups, weights=drawn, device=device, cuda_graph=captured,
            entries=lambda entry: parts.entry(entry, rank), **how,
        )  # fmt: skip

    def in_pairs() -> Engine:
        return Engine.connect(
            partition(model, Plan(dp=given.ranks // 2, tp=2)), drawn, device=device.type, cuda_graph=captured,
            timeout_s=600, shared_memory=sharing(device),
        )  # fmt: skip

    if given.shape == "8b":
        enter("1 GPU", 1, lambda: alone(whole, drawn, device, cuda_graph=captured), chosen)
    elif given.ranks > 2:
        enter("2 GPUs", 2, in_pairs, None)
    if captured:
        nccl = Choice.always("nccl")
        enter(f"{several}, NCCL", given.ranks, split, nccl)
        if not given.captured:
            enter(f"{several}, {COMPILED}, NCCL", given.ranks, lambda: split(compile=True), nccl, True)
        if given.compiled:
            enter(f"{several}, {COMPILED}", given.ranks, lambda: split(compile=True), chosen, True)
            enter(
                f"1 GPU, {COMPILED}",
                1,
                lambda: alone(whole, drawn, device, compile=True, cuda_graph=True),
                chosen,
                True,
            )
    return found, parts


def table(
    contestants: Mapping[str, Contestant],
    times: Mapping[str, Sequence[float]],
    limits: Mapping[int, float],
    said: Mapping[str, Tensor],
) -> None:
    """limits: seconds of a token, by the number of GPUs that share the weights out."""
    base = next((name for name in ("1 GPU", "2 GPUs") if name in contestants), next(iter(contestants)))
    fastest = min(times[base])
    for name, each in contestants.items():
        took, limit = min(times[name]), limits.get(each.gpus)
        of_limit = f"limit {limit * 1e3:6.3f} = {limit / took:4.0%}" if limit is not None else " " * 19
        alike = (said[name] == said[base]).long().cumprod(1).sum(1)
        same = f"first {int(alike.median())} of {said[base].shape[1]} tokens as {base}"
        print(
            f"{name:32} {took * 1e3:6.3f} ms/token  {of_limit}  {base} / this {fastest / took:5.2f}  slowest round "
            f"+{max(times[name]) / took - 1:.0%}  {same}",
            flush=True,
        )


def kernels(engine: Engine, ids: torch.Tensor, path: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.generate(ids, max_new_tokens=17, eos_token_id=[])
        torch.cuda.synchronize()
    with open(path, "w", encoding="utf-8") as file:
        file.write(profile.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=90))


@torch.no_grad()
def on_one(given: argparse.Namespace) -> None:
    model, (_, few, many) = build(given.layers or SHAPES["8b"]["num_hidden_layers"]), LENGTHS
    prompt = prompts(1)
    parts = partition(model, Plan())

    def theirs(**options: Any) -> Callable[[int], object]:
        return lambda count: model.generate(
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **options
        )

    def ours(**options: bool) -> Callable[[int], object]:
        engine = parts.engine(0, ThreadGroup(Mesh.of()).communicator(0), device="cuda", **options)
        steps.MOST_ROWS = 0 if options.get("compile") else MOST_ROWS
        engine.generate(prompt, max_new_tokens=many, eos_token_id=[])  # the cache for all
        return lambda count: engine.generate(prompt, max_new_tokens=count, eos_token_id=[])

    contestants = {
        "transformers, eager": theirs(),
        "transformers, static cache": theirs(cache_implementation="static"),
        "ours, eager": ours(),
        "ours, CUDA graph": ours(cuda_graph=True),
        f"ours, {COMPILED}": ours(compile=True),
        f"ours, {COMPILED}, CUDA graph": ours(compile=True, cuda_graph=True),
    }
    said = {}
    for name, generate in contestants.items():
        start = time.perf_counter()
        said[name] = generate(many)
        generate(few)
        print(f"warm: {name} ({time.perf_counter() - start:.0f} s)", flush=True)
    first = said["ours, eager"]
    for name, found in said.items():
        same = int((found[0, LENGTHS.prompt :] == first[0, LENGTHS.prompt :]).long().cumprod(0).sum())  # type: ignore[index]
        print(f"{name}: the first {same} of {many} tokens are those of ours, eager (bfloat16 rounds)")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(given.rounds):
        for name, generate in contestants.items():
            times[name].append((seconds(generate, many) - seconds(generate, few)) / (many - few))
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    cache = parts.cache_bytes(max_batch=1, max_length=LENGTHS.prompt + (few + many) // 2)[0]
    device, speed = torch.cuda.get_device_name(), measured_speed()
    sheet = next((value for key, value in DATA_SHEET.items() if key in device), speed)
    limit, achievable = (weights + cache) / sheet, (weights + cache) / speed
    print(
        f"{device}: {weights / 1e9:.2f} GB of weights and {cache / 1e6:.0f} MB of cache per token; data sheet "
        f"{sheet / 1e12:.2f} TB/s = {limit * 1e3:.2f} ms, measured {speed / 1e12:.2f} TB/s = {achievable * 1e3:.2f} ms"
    )
    for name, of_one in times.items():
        best = min(of_one)
        print(
            f"{name:28} {best * 1e3:6.2f} ms/token   {limit / best:5.0%} of the data sheet's limit, "
            f"{achievable / best:5.0%} of the measured one"
        )
    ours_best, theirs_best = (
        min(min(t) for name, t in times.items() if name.startswith(who)) for who in ("ours", "transformers")
    )
    print(f"ours / transformers, the best of each: {ours_best / theirs_best:.3f}")


if __name__ == "__main__":
    main()
