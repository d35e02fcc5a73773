"""What replicas and stages add to emission and proof: 256 ranks of one program against few, on the meta device.

python -m benchmarks.compiling.many_ranks [--layers 126] [--rounds 3]

A Llama-3.1-405B shape is traced once. Then, for tp=8 and dp=32 x tp=8, for tp=64 and dp=4 x tp=64, and for tp=8 and
dp=4 x pp=8 x tp=8, in turns: the layout check, the order of communication of all ranks and of their stages' schedules,
and every rank emitted (its graph, and its part of each weight). Prints the seconds of each and their ratio, which is to
be at most 1.2, and how much more than the mean the largest stage holds.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
import warnings
from collections.abc import Mapping

import torch
import transformers

from benchmarks.compiling.scale import LLAMA
from benchmarks.support.rounds import take_turns
from partitioner.compile.emit import Emitter
from partitioner.compile.pass_manager.choose_passes import choose
from partitioner.compile.tracing.trace import trace
from partitioner.program.program import Program
from partitioner.proof.layouts import check
from partitioner.proof.meetings import check_meetings
from partitioner.proof.schedules import prove_stages
from partitioner.sharding.mesh import Mesh

STAGES = {"dp": 4, "pp": 8, "tp": 8}


def named(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def laid_out(traced: Program, sizes: Mapping[str, int]) -> Program:
    program = choose("tensor-parallel").step.run(traced.copy(Mesh.of(**sizes)))
    return choose("pipeline").step.run(program) if "pp" in sizes else program


def bytes_of_stages(program: Program) -> list[int]:
    """What the first rank of each stage holds of weights."""
    emitter = Emitter(program)
    ranks = [emitter.rank({**dict.fromkeys(STAGES, 0), "pp": stage}) for stage in range(STAGES["pp"])]
    return [sum(weight.bytes for weight in rank.weights) for rank in ranks]


def prove_and_emit(program: Program) -> None:
    check(program)
    emitter = Emitter(program)
    ranks = [emitter.rank(coordinates) for coordinates in program.mesh]
    check_meetings(ranks)
    prove_stages(program)
    for rank in ranks:
        rank.graph  # noqa: B018 - builds it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=126)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    config = transformers.LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=given.layers, num_attention_heads=128, **LLAMA
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    start = time.perf_counter()
    traced = trace(model)
    print(f"{len(traced.graph.nodes)} nodes, traced in {time.perf_counter() - start:.1f} s", flush=True)
    for few, many in (({"tp": 8}, {"dp": 32, "tp": 8}), ({"tp": 64}, {"dp": 4, "tp": 64}), ({"tp": 8}, STAGES)):
        split = {named(sizes): laid_out(traced, sizes) for sizes in (few, many)}
        work = {name: functools.partial(prove_and_emit, program) for name, program in split.items()}
        times = take_turns(work, rounds=given.rounds)
        (first, alone), (second, together) = ((name, statistics.median(found)) for name, found in times.items())
        print(
            f"{first}: {alone:.2f} s for {math.prod(few.values())} ranks; {second}: {together:.2f} s for "
            f"{math.prod(many.values())} ranks; ratio {together / alone:.3f}",
            flush=True,
        )
    held = bytes_of_stages(split[second])
    print(
        f"weights of a rank, by stage: {', '.join(f'{each / 1e9:.2f}' for each in held)} GB; the largest over the mean "
        f"{max(held) / statistics.mean(held):.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
