"""One decoded token of a Llama-3-8B shape in bfloat16 on one GPU, against transformers and the memory's speed.

    ours                 tp=1: eager, torch.compile, CUDA graph, and both
    transformers         generate: DynamicCache, eager; StaticCache, which it compiles

Random weights (they say nothing, and take as long). Time per token: the difference between generating 16 and 144 tokens
after a prompt of 128, over 128, the best of some rounds in which the contestants take turns. A decode step reads every
weight but the embedding's table once, and the cache: those bytes over the memory's speed are the limit. The speed is
measured by summing a large tensor, and is set against the data sheet's where the device is known.

    python -m benchmarks.decode_gpu                  about five minutes, most of it compiling
    python -m benchmarks.decode_gpu --layers 8       a part of the model
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

from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup

PROMPT, FEW, MANY, ROUNDS = 128, 16, 144, 3
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


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="One decoded token on a GPU.")
    parser.add_argument("--layers", type=int, default=32)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    model = build(given.layers)
    prompt = torch.randint(0, 128256, (1, PROMPT), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    parts = partition(model, Plan())

    def theirs(**options: Any) -> Callable[[int], object]:
        return lambda count: model.generate(
            prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, **options
        )

    def ours(**options: bool) -> Callable[[int], object]:
        engine = parts.engine(0, ThreadGroup(Mesh.of()).communicator(0), device="cuda", **options)
        engine.generate(prompt, max_new_tokens=MANY, eos_token_id=[])  # the cache for all
        return lambda count: engine.generate(prompt, max_new_tokens=count, eos_token_id=[])

    contestants = {
        "transformers, eager": theirs(),
        "transformers, static cache": theirs(cache_implementation="static"),
        "ours, eager": ours(),
        "ours, CUDA graph": ours(cuda_graph=True),
        "ours, compile": ours(compile=True),
        "ours, compile + CUDA graph": ours(compile=True, cuda_graph=True),
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
