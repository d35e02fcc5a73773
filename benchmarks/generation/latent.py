"""A decoded token over a latent cache, against one over keys and values, by how many tokens are cached.

One layer of DeepSeek-V3's attention as one of 8 ranks of tp has it: 16 heads, keys of 128 + 64, values of 128, a latent
of 512; hidden size 7,168, float32, CPU, one thread. The narrow values are random; keys and values are made of them, so
that both caches say the same, and the logits of both must agree. The two take turns; what is printed is the ratio of
the medians, latent / expanded, and the quartiles of that ratio within a round.

    python -m benchmarks.generation.latent                    1,024 and 32,768 cached tokens
    python -m benchmarks.generation.latent --bytes            bytes per token and layer of DeepSeek-V3, by tp
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DeepseekV3Config

from benchmarks.support.rounds import Ratio, rounds_in, take_turns
from partitioner import Plan, partition
from partitioner.cli.common.tables import print_table
from runtime.communication.thread_communicator import ThreadGroup
from runtime.execution.profile import Profiler
from runtime.execution.prompts.piece import Piece
from runtime.generation.steps import Loaded, Steps
from runtime.kv_cache.cache import Cache
from runtime.weights.load_weights import load_weights

HEADS, NOPE, ROPE, VALUE, LATENT = 16, 128, 64, 128, 512
_CLOSE = 1e-4


def build() -> Any:
    """One layer, a small FFN and vocabulary beside its attention."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=512, num_hidden_layers=1, first_k_dense_replace=1, intermediate_size=256, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=65536,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float().eval()


def steps_of(model: Any, way: str, cached: int) -> Steps:
    """One rank whose cache holds `cached` tokens, the same whichever way they are kept."""
    parts = partition(model, Plan(cache=way))
    program = parts.entry("decode", 0)
    device = torch.device("cpu")
    cache = Cache(program.states, max_batch=1, max_length=cached + 1, step=1, device=device)
    drawn = torch.randn(cached, LATENT + ROPE, generator=torch.Generator().manual_seed(1))
    latent, carried = drawn.split([LATENT, ROPE], -1)
    if way == "latent":
        (buffer,) = cache.buffers.values()
        buffer[0, 0, :cached] = drawn
    else:
        weight = model.model.layers[0].self_attn.kv_b_proj.weight.detach().view(HEADS, NOPE + VALUE, LATENT)
        made = torch.einsum("tr,hnr->htn", latent, weight)
        for name, buffer in cache.buffers.items():
            if name.endswith(".key"):
                buffer[0, :, :cached, :NOPE] = made[..., :NOPE]
                buffer[0, :, :cached, NOPE:] = carried
            else:
                buffer[0, :, :cached] = made[..., NOPE:]
    communicator = ThreadGroup(parts.mesh).communicator(0)
    loaded = Loaded(program, load_weights(program.weights, program.weight_data, None, device))
    return Steps(loaded, loaded, cache, communicator, device, Profiler(program, device))


def compare(cached: int, seconds: float) -> tuple[float, float, Ratio]:
    """Milliseconds of a step over each cache, and their ratio."""
    model = build()
    both = {way: steps_of(model, way, cached) for way in ("latent", "expanded")}
    piece = Piece([[7]], [cached], (True,), (True,))
    ours, theirs = (steps.run(piece, decode=True) for steps in both.values())
    if (ours - theirs).abs().max() > _CLOSE * theirs.abs().max():
        sys.exit(f"{cached} tokens: the logits of the two caches differ by {(ours - theirs).abs().max():.2e}")
    contestants = {way: lambda steps=steps: steps.run(piece, decode=True) for way, steps in both.items()}
    times = take_turns(contestants, rounds=rounds_in(seconds, contestants))
    medians = [torch.tensor(times[way]).median().item() * 1e3 for way in contestants]
    return medians[0], medians[1], Ratio.of(times["latent"], times["expanded"])


def print_bytes(console: Console) -> None:
    """Of DeepSeek-V3's own configuration, four of its layers, bfloat16."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(DeepseekV3Config(num_hidden_layers=4), dtype=torch.bfloat16).eval()
    table = Table()
    for column in ("plan", "cache=expanded", "cache=latent"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for tp in (1, 8):
        sizes = [
            partition(model, Plan(tp=tp, cache=way)).generation_report.bytes_per_token[0] // 4
            for way in ("expanded", "latent")
        ]
        table.add_row(f"tp={tp}", *(f"{size:,}" for size in sizes))
    print_table("DeepSeek-V3, bytes per token and layer of each rank", table)


def main() -> None:
    parser = argparse.ArgumentParser(description="A decoded token over a latent cache, against keys and values.")
    parser.add_argument("--cached", type=int, nargs="+", default=[1024, 32768])
    parser.add_argument("--seconds", type=float, default=20.0, help="per number of tokens; at least 5 rounds are run")
    parser.add_argument("--bytes", action="store_true", help="bytes per token instead of times")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    console = Console(width=None if sys.stdout.isatty() else 110)
    if given.bytes:
        print_bytes(console)
        return
    table = Table()
    for column in ("cached tokens", "latent ms", "expanded ms", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for cached in given.cached:
        ours, theirs, ratio = compare(cached, given.seconds)
        table.add_row(f"{cached:,}", f"{ours:.1f}", f"{theirs:.1f}", str(ratio))
    print_table("a decoded token: latent / expanded", table)


if __name__ == "__main__":
    main()
