"""What is alive at once in a prompt's run: predicted by liveness, and measured, for ten architectures.

    python -m benchmarks.planning.activation_peaks [--tokens 512] [--batch 2]
    python -m benchmarks.planning.activation_peaks --device cuda --tokens 2048

predicted    the most bytes of results alive at the same time in a part (`Pricer.memory`), its buffers for exchanges not
measured     on a CPU, bytes of storages that ops made and that are still referred to, at most, while one prompt is
             prefilled; weights, the cache (set aside before) and inputs do not count. On a GPU, what torch's allocator
             had handed out at most, over what it had before the prompt (`torch.cuda.max_memory_allocated`)
other        on a CPU, what its allocator handed out meanwhile, the insides of kernels among it; on a GPU, the storages
kept         on a GPU, what an earlier, shorter prompt left behind, and no weight or cache is: workspaces of libraries

The text of each row's model: random weights, one rank; on a CPU hidden size 256, 4 layers, float32, one thread; on a
GPU hidden size 1024, 2 layers, bfloat16, node by node, as a prompt runs that has not come before.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.support.live_bytes import LiveBytes
from partitioner import CacheSize, Parts, Plan, partition
from partitioner.planning.cluster import Cluster
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import summarize_program
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.generation import steps

SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "intermediate_size": 1024, "vocab_size": 1024, "max_position_embeddings": 4096,
}  # fmt: skip
LARGE = {
    **SHAPE, "hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "head_dim": 64,
    "intermediate_size": 4096, "vocab_size": 8192,
}  # fmt: skip
"""On a GPU, whose allocator rounds up to 512 bytes."""
EXPERTS = {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
Prefill = Callable[[int], None]
WARM = 64
"""Tokens less of the prompt before: kernels are loaded then, and libraries take their workspaces."""
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "granite": {},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
}


@dataclass(frozen=True)
class Peak:
    """Bytes. at: the op that made the last of the results that are alive at the peak."""

    predicted: float
    measured: float
    other: float
    kept: float
    at: str


def model_of(kind: str, fields: dict[str, Any], device: torch.device) -> Any:
    shape, dtype = (SHAPE, torch.float32) if device.type == "cpu" else (LARGE, torch.bfloat16)
    config = CONFIG_MAPPING[kind](**{**shape, **fields}, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def predict(kind: str, tokens: int, batch: int, device: str = "cpu") -> tuple[Parts, float]:
    """The model on one rank, and bytes."""
    torch.manual_seed(0)
    where = torch.device(device)
    parts = partition(model_of(kind, MODELS[kind], where), Plan())
    assert parts.traced is not None
    summary = summarize_program(parts.traced)
    pricer = Pricer(summary, Cluster.parse("CPU" if where.type == "cpu" else "H200"))
    return parts, pricer.memory(Plan(), Workload(tokens, 1, batch), (summary.num_layers,)).activations


def measure(kind: str, tokens: int, batch: int, device: str = "cpu") -> Peak:
    where = torch.device(device)
    parts, predicted = predict(kind, tokens, batch, device)
    engine = Engine(
        parts.rank(0),
        ThreadGroup(parts.mesh).communicator(0),
        device=where,
        entries=lambda entry: parts.entry(entry, 0),
    )
    engine.reserve(CacheSize(max_batch=batch, max_length=tokens + 8, prefill_step=tokens))
    ids = torch.randint(3, 1000, (batch, tokens))

    def prefill(tokens: int) -> None:
        engine.generate(ids[:, :tokens], max_new_tokens=1, do_sample=False)

    by = _on_cpu if where.type == "cpu" else _on_gpu
    measured, other, kept, at = by(prefill, tokens, where)
    return Peak(predicted, measured, other, kept, at)


def _on_cpu(prefill: Prefill, tokens: int, device: torch.device) -> tuple[float, float, float, str]:
    prefill(tokens)
    with LiveBytes() as seen:
        prefill(tokens)
    with torch.profiler.profile(profile_memory=True) as profile:
        prefill(tokens)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return seen.most, most, 0, seen.at


def _on_gpu(prefill: Prefill, tokens: int, device: torch.device) -> tuple[float, float, float, str]:
    before = _handed_out(device)
    prefill(tokens - WARM)
    kept = _handed_out(device)
    torch.cuda.reset_peak_memory_stats(device)
    prefill(tokens)
    torch.cuda.synchronize(device)
    most = torch.cuda.max_memory_allocated(device) - kept
    with LiveBytes() as seen:
        prefill(tokens)
    return most, seen.most, kept - before, seen.at


def _handed_out(device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--models", default=",".join(MODELS), help="with commas")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    steps.CAPTURED_ON = frozenset()
    other = "allocator" if given.device == "cpu" else "results"
    print(f"{'model':12} {'predicted':>10} {'measured':>10} {'ratio':>6} {other:>10} {'ratio':>6} {'kept':>9}  peak at")
    off = []
    for kind in given.models.split(","):
        peak = measure(kind, given.tokens, given.batch, given.device)
        off.append(abs(peak.predicted / peak.measured - 1))
        print(
            f"{kind:12} {peak.predicted / 1e6:7.2f} MB {peak.measured / 1e6:7.2f} MB "
            f"{peak.predicted / peak.measured:6.3f} {peak.other / 1e6:7.2f} MB {peak.predicted / peak.other:6.3f} "
            f"{peak.kept / 1e6:6.2f} MB  {peak.at}",
            flush=True,
        )
    print(f"within 10%: {sum(each <= 0.1 for each in off)} of {len(off)}; largest error {max(off):.1%}")


if __name__ == "__main__":
    main()
