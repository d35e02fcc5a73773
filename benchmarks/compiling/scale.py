"""What compiling takes against torch.export of the whole model: hundreds of billions of parameters, on the meta device.

python -m benchmarks.compiling.scale [llama-405b] [llama-70b] [deepseek-671b] [llama-8b]   each in a process of its own

Prints the seconds of a compile (trace, in which identical layers are traced once, analysis, passes, checks, all ranks'
graphs), those of torch.export with every layer traced, in the same process afterwards, and their ratio; the peak memory
of the compile, and the fullest rank's share of what is split. tp = 8, of the 8B tp = 2. Seconds are those of the
processor, so that others' work on the machine does not count.
"""

from __future__ import annotations

import contextlib
import gc
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
from partitioner.capture.layers.share_layers import every_layer
from partitioner.compile.partition import compile_program, trace

PLANS = {"llama-8b": Plan.parse("tp=2")}
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
    "llama-8b": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA
        )
    ),
    "deepseek-671b": lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config()),
}


@contextlib.contextmanager
def export_timed(seconds: list[float]) -> Iterator[None]:
    """Adds up the time inside torch.export.export, the garbage collector running, as it is by default."""
    real = torch.export.export

    def timed(*args: Any, **kwargs: Any) -> Any:
        enabled = gc.isenabled()
        gc.enable()
        start = time.process_time()
        try:
            return real(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - start)
            if not enabled:
                gc.disable()

    torch.export.export = timed
    try:
        yield
    finally:
        torch.export.export = real


def tiny() -> Any:
    """Two layers: what is imported and set up by the first compile of a process is paid for by this one."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def measure(name: str) -> None:
    warnings.simplefilter("ignore")
    with torch.device("meta"):
        model = SHAPES[name]().to(torch.bfloat16).eval()
    plan = PLANS.get(name, PLAN)
    start = time.process_time()
    compile_program(trace(tiny()), plan)
    first = time.process_time() - start
    start = time.process_time()
    traced = trace(model)
    tracing = time.process_time() - start
    parts = compile_program(traced, plan)
    for rank in range(plan.mesh.world_size):
        parts.rank(rank).graph  # noqa: B018 - builds it
    total = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    inside: list[float] = []
    with export_timed(inside), every_layer():
        trace(model)
    export = sum(inside)
    split = sum(row.bytes * len(row.names) for row in parts.report.rows if row.split)
    whole = parts.report.bytes_whole - split
    share = (max(parts.report.bytes_per_rank) - whole) / split
    nodes = len(parts.program.graph.nodes)
    assert traced.layers is not None
    print(
        f"{name}, {plan}: {nodes} nodes; {traced.layers.traced} of {traced.layers.layers} layers traced; "
        f"compiled in {total:.1f} s (trace {tracing:.1f}; before it {first:.1f} s for a model of two layers, which "
        f"imports what is needed), torch.export of every layer {export:.1f} s, "
        f"ratio {total / export:.2f}; peak memory {memory:.2f} GB; "
        f"fullest rank {share * plan.tp:.4f} of 1/{plan.tp} of what is split "
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
