"""What compiling takes against torch.export of the whole model: hundreds of billions of parameters, on the meta device.

python -m benchmarks.compiling.scale [--rounds 3] [llama-405b] [llama-70b] [deepseek-671b] [llama-8b]

The two take turns, each in a process of its own. A compile is the whole of it: the trace, in which identical layers are
traced once, analysis, passes, checks, all ranks' graphs. Against it stands torch.export.export of the same model as
transformers has it, every layer of it, with nothing of this product: batch and sequence dynamic, not strict, without a
cache and without gradients. Seconds are those of the processor, so that others' work on the machine does not count;
what a process imports and sets up by its first export is left out, for both. Prints the median of each with the fastest
and the slowest, their ratio, the peak memory of both processes and what they held before, and the fullest rank's share
of what is split. tp = 8, of the 8B tp = 2.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.export import Dim

from partitioner import Plan
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace

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


def tiny() -> Any:
    """Two layers: what is imported and set up by the first export of a process is paid for by this one."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def compiled(model: Any, plan: Plan) -> dict[str, Any]:
    """A whole compile, with what is said of it."""
    start = time.process_time()
    traced = trace(model)
    tracing = time.process_time() - start
    parts = compile_program(traced, plan)
    for rank in range(plan.mesh.world_size):
        parts.rank(rank).graph  # noqa: B018 - builds it
    split = sum(row.bytes * len(row.names) for row in parts.report.rows if row.split)
    whole = parts.report.bytes_whole - split
    assert traced.layers is not None
    return {
        "trace": tracing,
        "nodes": len(parts.program.graph.nodes),
        "layers": (traced.layers.traced, traced.layers.layers),
        "share": (max(parts.report.bytes_per_rank) - whole) / split * plan.tp,
        "split": split,
        "whole": whole,
    }


def exported(model: Any, plan: Plan) -> dict[str, Any]:
    """By torch alone, which has no plan."""
    ids = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    dims = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=dims, strict=False
        )
    return {"nodes": len(program.graph.nodes)}


CONTESTANTS: dict[str, Callable[[Any, Plan], dict[str, Any]]] = {"compile": compiled, "export": exported}


def measure(contestant: str, name: str) -> None:
    warnings.simplefilter("ignore")
    plan, run = PLANS.get(name, PLAN), CONTESTANTS[contestant]
    run(tiny(), plan)
    with torch.device("meta"):
        model = SHAPES[name]().to(torch.bfloat16).eval()
    before = peak()
    start = time.process_time()
    found = run(model, plan)
    found |= {"seconds": time.process_time() - start, "before": before, "peak": peak()}
    print(json.dumps(found), flush=True)


def peak() -> float:
    """Of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def compare(name: str, rounds: int) -> None:
    found: dict[str, list[dict[str, Any]]] = {contestant: [] for contestant in CONTESTANTS}
    for _ in range(rounds):
        for contestant, measured in found.items():
            command = [sys.executable, "-m", "benchmarks.compiling.scale", "--one", contestant, name]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured.append(json.loads(said.splitlines()[-1]))
    ours, torch_alone = found["compile"], found["export"]
    ratio = statistics.median(_seconds(ours)) / statistics.median(_seconds(torch_alone))
    tracing = statistics.median(each["trace"] for each in ours)
    last, plan = ours[-1], PLANS.get(name, PLAN)
    traced, layers = last["layers"]
    print(
        f"{name}, {plan}: {last['nodes']} nodes; {traced} of {layers} layers traced; compiled in {_told(ours)} s "
        f"(trace {tracing:.1f}), torch.export of every layer {_told(torch_alone)} s "
        f"({torch_alone[-1]['nodes']} nodes), ratio {ratio:.2f}; peak memory {_memory(ours)}, of torch.export "
        f"{_memory(torch_alone)}; fullest rank {last['share']:.4f} of 1/{plan.tp} of what is split "
        f"({last['split'] / 1e9:.0f} of {(last['split'] + last['whole']) / 1e9:.0f} GB)",
        flush=True,
    )


def _seconds(measured: list[dict[str, Any]]) -> list[float]:
    return [each["seconds"] for each in measured]


def _told(measured: list[dict[str, Any]]) -> str:
    seconds = _seconds(measured)
    spread = f" ({min(seconds):.1f} to {max(seconds):.1f})" if len(seconds) > 1 else ""
    return f"{statistics.median(seconds):.1f}{spread}"


def _memory(measured: list[dict[str, Any]]) -> str:
    return f"{max(each['peak'] for each in measured):.2f} GB ({max(each['before'] for each in measured):.2f} before)"


def main() -> None:
    parser = argparse.ArgumentParser(description="What compiling takes against torch.export of the whole model.")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [name for name in options.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"unknown shape {unknown[0]!r}; the shapes are {', '.join(SHAPES)}")
    for name in options.shapes or SHAPES:
        if options.one is None:
            compare(name, options.rounds)
        else:
            measure(options.one, name)


if __name__ == "__main__":
    main()
