"""What is alive at once in a prompt's run: predicted by liveness, and measured on a CPU, for ten architectures.

    python -m benchmarks.planning.activation_peaks [--tokens 512] [--batch 2]

predicted    the most bytes of results alive at the same time in a part (`Pricer.memory`), its buffers for exchanges not
measured     bytes of storages that ops made and that are still referred to, at most, while one prompt is prefilled;
             weights, the cache (set aside before) and inputs do not count. `allocator`: what torch's allocator handed
             out meanwhile, which has the insides of kernels in it too

The text of each row's model: hidden size 256, 4 layers, random weights in float32, one rank, one thread.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from partitioner import CacheSize, Plan, partition
from partitioner.planning.cluster import Cluster
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import summarize_program

SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "intermediate_size": 1024, "vocab_size": 1024, "max_position_embeddings": 4096,
}  # fmt: skip
EXPERTS = {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
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


class LiveBytes(TorchDispatchMode):
    """The most bytes of results that were alive at the same time, and which op made the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.at = 0, ""
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and (found := _storage(each)) not in given:
                self._live[found] = each.untyped_storage().nbytes()
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        now = sum(self._live.values())
        if now > self.most:
            self.most, self.at = now, str(func)
        return made


def _storage(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def model_of(kind: str, fields: dict[str, Any]) -> Any:
    config = CONFIG_MAPPING[kind](**{**SHAPE, **fields}, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def measure(kind: str, tokens: int, batch: int) -> tuple[float, float, float, str]:
    """Bytes predicted, of results, of the allocator; and the op at the peak."""
    torch.manual_seed(0)
    parts = partition(model_of(kind, MODELS[kind]), Plan())
    assert parts.traced is not None
    summary = summarize_program(parts.traced)
    pricer = Pricer(summary, Cluster.parse("CPU"))
    predicted = pricer.memory(Plan(), Workload(tokens, 1, batch), (summary.num_layers,)).activations
    engine = parts._simulators[0].engines[0]
    engine.reserve(CacheSize(max_batch=batch, max_length=tokens + 8))
    ids = torch.randint(3, 1000, (batch, tokens))
    engine.generate(ids, max_new_tokens=1, do_sample=False)
    with LiveBytes() as seen:
        engine.generate(ids, max_new_tokens=1, do_sample=False)
    with torch.profiler.profile(profile_memory=True) as profile:
        engine.generate(ids, max_new_tokens=1, do_sample=False)
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return predicted, seen.most, most, seen.at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--models", default=",".join(MODELS), help="with commas")
    given = parser.parse_args()
    print(f"{'model':12} {'predicted':>10} {'measured':>10} {'ratio':>6} {'allocator':>10} {'ratio':>6}  peak at")
    off = []
    for kind in given.models.split(","):
        predicted, results, allocator, at = measure(kind, given.tokens, given.batch)
        off.append(abs(predicted / results - 1))
        print(
            f"{kind:12} {predicted / 1e6:7.2f} MB {results / 1e6:7.2f} MB {predicted / results:6.3f} "
            f"{allocator / 1e6:7.2f} MB {predicted / allocator:6.3f}  {at}",
            flush=True,
        )
    print(f"within 10%: {sum(each <= 0.1 for each in off)} of {len(off)}; largest error {max(off):.1%}")


if __name__ == "__main__":
    main()
