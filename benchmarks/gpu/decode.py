"""One decoded token of a Llama-3-8B shape in bfloat16 on GPUs, against transformers and the memory's speed.

    ours                 tp=1: eager, CUDA graph with kernels of ours, torch.compile, and that in a CUDA graph
    transformers         generate: DynamicCache, eager; StaticCache, which it compiles

Random weights (they say nothing, and take as long). Time per token: the difference between generating 16 and 144 tokens
after a prompt of 128, over 128, the best of some rounds in which the contestants take turns. A decode step reads every
weight but the embedding's table once, and the cache: those bytes over the memory's speed are the limit. The speed is
measured by summing a large tensor, and is set against the data sheet's where the device is known.

On several GPUs (`--ranks`): tensor parallelism in captured steps, all-reduces by each other's memory and by NCCL; what
gpt-fast does (compiled by torch, NCCL, captured); and on each GPU all of the model where it fits. `--compiled` adds all
of them compiled. The limit is a rank's bytes over the measured speed and one call of
the quickest all-reduce of this run for each in a step. `--shape 70b` is Llama-3-70B's: two GPUs have room for it, and
are what more are set against.

    python -m benchmarks.gpu.decode                  about five minutes, most of it compiling
    python -m benchmarks.gpu.decode --layers 8       a part of the model
    python -m benchmarks.gpu.decode --ranks 2        two GPUs; 4, 8
    python -m benchmarks.gpu.decode --ranks 8 --shape 70b --batch 32
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.pipeline import alone
from benchmarks.support.decoders import SHAPES, DrawnWeights, decoder
from benchmarks.support.ranks import launch_ranks
from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.peer_memory.choice import Choice
from runtime.communication.peer_memory.measure import candidates, microseconds
from runtime.communication.process_groups import ProcessGroups
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.generation import steps
from runtime.ops.collectives import all_reduce
from runtime.ops.kernels.decode.few_rows import MOST_ROWS
from runtime.processes.launch import begin_worker

PROMPT, FEW, MANY, ROUNDS = 128, 16, 144, 3
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


def measured_speed() -> float:
    """Bytes per second of reading."""
    block = torch.ones(2**31, dtype=torch.bfloat16, device="cuda")
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        block.sum()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best


def seconds(generate: Callable[[int], object], count: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    generate(count)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="One decoded token on a GPU.")
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--shape", choices=("8b", "70b"), default="8b", help="70b on several GPUs only")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="on several GPUs: all contestants, compiled besides")
    parser.add_argument("--kernels", default="", help="a file for the kernels of 16 tokens of rank 0, by time")
    given = parser.parse_args()
    given.layers = given.layers or SHAPES[given.shape]["num_hidden_layers"]
    if given.ranks == 1 and given.shape != "8b":
        parser.error(f"--shape {given.shape} is for several GPUs: give --ranks 2, 4 or 8")
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    if given.ranks == 1:
        on_one(given)
    elif "RANK" in os.environ:
        begin_worker()
        on_several(given)
    else:
        options = [f"--{name}={value}" for name, value in vars(given).items() if name != "compiled"]
        options += ["--compiled"] if given.compiled else []
        launch_ranks(["benchmarks.gpu.decode", *options], num_ranks=given.ranks, timeout_s=1200)


def prompts(batch: int) -> torch.Tensor:
    return torch.randint(0, 128256, (batch, PROMPT), device="cuda", generator=torch.Generator("cuda").manual_seed(0))


@torch.no_grad()
def on_several(given: argparse.Namespace) -> None:
    """One of several ranks: all take their turns together, and the slowest counts."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    device, ids = torch.device("cuda", rank), prompts(given.batch)
    model = decoder(given.shape, layers=given.layers, positions=8192, device=device)
    drawn, parts = DrawnWeights(model, device), partition(model, Plan(tp=given.ranks))
    first = Engine.connect(parts, drawn, device="cuda", cuda_graph=True, timeout_s=600, shared_memory="on")
    groups = first.communicator
    assert isinstance(groups, ProcessGroups)
    print(f"rank {rank}: {groups.transports}", flush=True)
    (peers,) = groups.peers.values()
    chosen = peers.choice

    num_bytes = sum(p.nbytes for p in model.parameters())
    # a part of the weights for each contestant, and what runs need; reckoned, so that all ranks choose alike
    room = 0.8 * torch.cuda.get_device_properties(0).total_memory - num_bytes / given.ranks
    several, nccl, whole = f"{given.ranks} GPUs", Choice.always("nccl"), partition(model, Plan())
    contestants: dict[str, tuple[Engine, Choice]] = {several: (first, chosen)}

    def enter(name: str, choice: Choice, size: float, make: Callable[[], Engine]) -> None:
        nonlocal room
        if size < room:
            room -= size
            contestants[name] = (make(), choice)
        elif rank == 0:
            print(f"left out: {name}: there is no room for its weights besides")

    def split(**how: bool) -> Engine:
        return Engine(
            parts.entry("text", rank), groups, weights=drawn, device="cuda", cuda_graph=True,
            entries=lambda entry: parts.entry(entry, rank), **how,
        )  # fmt: skip

    part = num_bytes / given.ranks
    enter(f"{several}, NCCL", nccl, part, split)
    enter(f"{several}, {COMPILED}, NCCL", nccl, part, lambda: split(compile=True))
    enter("1 GPU", chosen, num_bytes, lambda: alone(whole, drawn, device, cuda_graph=True))
    if given.compiled:
        enter(f"{several}, {COMPILED}", chosen, part, lambda: split(compile=True))
        enter(
            f"1 GPU, {COMPILED}", chosen, num_bytes, lambda: alone(whole, drawn, device, compile=True, cuda_graph=True)
        )
    said = {}
    for name, (engine, choice) in contestants.items():
        peers.choice = choice  # what is captured stays so
        steps.MOST_ROWS = 0 if COMPILED in name else MOST_ROWS
        start = time.perf_counter()
        said[name] = engine.generate(ids, max_new_tokens=MANY, eos_token_id=[])
        engine.generate(ids, max_new_tokens=FEW, eos_token_id=[])
        if rank == 0:
            print(f"warm: {name} ({time.perf_counter() - start:.0f} s)", flush=True)
    peers.choice = chosen
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(2 * ROUNDS):
        for name, (engine, _) in contestants.items():
            took = [
                seconds(lambda n, e=engine: e.generate(ids, max_new_tokens=n, eos_token_id=[]), n) for n in (MANY, FEW)
            ]
            times[name].append((took[0] - took[1]) / (MANY - FEW))
    reduced = 2 * model.config.hidden_size * given.batch
    ways = microseconds(candidates(peers, "all_reduce", reduced), peers.device, calls=100, rounds=11)
    reduces = sum(node.target is all_reduce for node in parts.entry("decode", rank).graph.nodes)
    speed = measured_speed()
    table = model.get_input_embeddings().weight.nbytes
    weights = num_bytes - table
    cache = parts.cache_bytes(max_batch=given.batch, max_length=PROMPT + (FEW + MANY) // 2)[0]
    if rank == 0:
        best = {name: min(of_one) for name, of_one in times.items()}
        quickest = min(ways, key=ways.__getitem__)
        own = weights / given.ranks + cache
        limit = {True: own / speed + reduces * ways[quickest] * 1e-6, False: (weights + cache * given.ranks) / speed}
        base = "1 GPU" if "1 GPU" in contestants else next(iter(contestants))
        plain = said[base]
        print(
            f"{given.ranks} x {torch.cuda.get_device_name()}, {given.shape}, {given.layers} layers, batch "
            f"{given.batch}; measured {speed / 1e12:.2f} TB/s; {reduces} all-reduces of {reduced} bytes, the quickest "
            f"{quickest} {ways[quickest]:.1f} us, NCCL {ways['nccl']:.1f} us"
        )
        for name, took in best.items():
            spread = max(times[name]) / took - 1
            same = int((said[name][0, PROMPT:] == plain[0, PROMPT:]).long().cumprod(0).sum())
            print(
                f"{name:32} {took * 1e3:6.3f} ms/token  limit {limit['GPUs' in name] * 1e3:6.3f} = "
                f"{limit['GPUs' in name] / took:4.0%}  {base} / this {best[base] / took:5.2f}  "
                f"slowest round +{spread:.0%}  first {same} tokens as {base}"
            )
    if given.kernels:
        kernels(first, ids, given.kernels if rank == 0 else os.devnull)
    for engine, _ in contestants.values():
        if engine is not first:
            engine._generate_loop.release()
    first.close()


def kernels(engine: Engine, ids: torch.Tensor, path: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.generate(ids, max_new_tokens=17, eos_token_id=[])
        torch.cuda.synchronize()
    with open(path, "w", encoding="utf-8") as file:
        file.write(profile.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=90))


@torch.no_grad()
def on_one(given: argparse.Namespace) -> None:
    model = build(given.layers)
    prompt = prompts(1)
    parts = partition(model, Plan())

    def theirs(**options: Any) -> Callable[[int], object]:
        return lambda count: model.generate(
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **options
        )

    def ours(**options: bool) -> Callable[[int], object]:
        engine = parts.engine(0, ThreadGroup(Mesh.of()).communicator(0), device="cuda", **options)
        steps.MOST_ROWS = 0 if options.get("compile") else MOST_ROWS
        engine.generate(prompt, max_new_tokens=MANY, eos_token_id=[])  # the cache for all
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
        said[name] = generate(MANY)
        generate(FEW)
        print(f"warm: {name} ({time.perf_counter() - start:.0f} s)", flush=True)
    first = said["ours, eager"]
    for name, found in said.items():
        same = int((found[0, PROMPT:] == first[0, PROMPT:]).long().cumprod(0).sum())  # type: ignore[index]
        print(f"{name}: the first {same} of {MANY} tokens are those of ours, eager (bfloat16 rounds)")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, generate in contestants.items():
            times[name].append((seconds(generate, MANY) - seconds(generate, FEW)) / (MANY - FEW))
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    cache = parts.cache_bytes(max_batch=1, max_length=PROMPT + (FEW + MANY) // 2)[0]
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
