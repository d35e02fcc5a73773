"""What compiling adds to tracing, for models of hundreds of billions of parameters, on the meta device.

python -m benchmarks.compiling.scale [llama-405b] [llama-70b] [deepseek-671b]     each in a process of its own, tp = 8

Prints the seconds that torch.export takes by itself, those of everything else (capture around it, analysis, the pass,
the check, all eight graphs), their ratio, the peak memory, and the fullest rank's share of what is split.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

from partitioner import Plan
from partitioner.compile.partition import compile_program, trace

PLAN = Plan.parse("tp=8")
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
SHAPES: dict[str, Callable[[], Any]] = {
    "llama-405b": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, **LLAMA
        )
    ),
    "llama-70b": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
        )
    ),
    "deepseek-671b": lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config()),
}


@contextlib.contextmanager
def export_timed(seconds: list[float]) -> Iterator[None]:
    """Adds up the time inside torch.export.export."""
    real = torch.export.export

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    torch.export.export = timed
    try:
        yield
    finally:
        torch.export.export = real


def measure(name: str) -> None:
    warnings.simplefilter("ignore")
    with torch.device("meta"):
        model = SHAPES[name]().to(torch.bfloat16).eval()
    inside: list[float] = []
    start = time.perf_counter()
    with export_timed(inside):
        parts = compile_program(trace(model), PLAN)
    for rank in range(PLAN.mesh.world_size):
        parts.rank(rank).graph  # noqa: B018 - builds it
    total = time.perf_counter() - start
    export = sum(inside)
    split = sum(row.bytes * len(row.names) for row in parts.report.rows if row.split)
    whole = parts.report.bytes_whole - split
    share = (max(parts.report.bytes_per_rank) - whole) / split
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    nodes = len(parts.program.graph.nodes)
    print(
        f"{name}: {nodes} nodes; torch.export {export:.1f} s, everything else {total - export:.1f} s, "
        f"ratio {(total - export) / export:.2f}; peak memory {memory:.2f} GB; "
        f"fullest rank {share * PLAN.tp:.4f} of 1/{PLAN.tp} of what is split "
        f"({split / 1e9:.0f} of {(split + whole) / 1e9:.0f} GB)",
        flush=True,
    )


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        measure(sys.argv[2])
        return
    for name in sys.argv[1:] or SHAPES:
        if name not in SHAPES:
            sys.exit(f"unknown shape {name!r}; the shapes are {', '.join(SHAPES)}")
        subprocess.run([sys.executable, "-m", "benchmarks.compiling.scale", "--one", name], check=True)


if __name__ == "__main__":
    main()
