"""What replicas add to emission and proof: 256 ranks of one program against those of one replica, on the meta device.

python -m benchmarks.compiling.many_ranks [--layers 126] [--rounds 3]

A Llama-3.1-405B shape is traced once. Then, for tp=8 and dp=32 x tp=8, and for tp=64 and dp=4 x tp=64, in turns: the
layout check, the order of communication of all ranks, and every rank emitted (its graph, and its part of each weight).
Prints the seconds of each and their ratio, which is to be at most 1.2.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
import transformers

from benchmarks.compiling.scale import LLAMA
from benchmarks.support.rounds import take_turns
from partitioner.compile.emit import Emitter
from partitioner.compile.partition import trace
from partitioner.compile.run_passes import choose
from partitioner.program import Program
from partitioner.proof.layouts import check
from partitioner.proof.meetings import check_meetings
from partitioner.sharding.mesh import Mesh


def prove_and_emit(program: Program) -> None:
    check(program)
    emitter = Emitter(program)
    ranks = [emitter.rank(coordinates) for coordinates in program.mesh]
    check_meetings(ranks)
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
    for dp, tp in ((32, 8), (4, 64)):
        split = [choose("tensor-parallel").step.run(traced.copy(Mesh.of(dp=d, tp=tp))) for d in (1, dp)]
        names = [f"tp={tp}", f"dp={dp} x tp={tp}"]
        work = {
            name: (lambda program=program: prove_and_emit(program)) for name, program in zip(names, split, strict=True)
        }
        times = take_turns(work, rounds=given.rounds)
        alone, together = (statistics.median(times[name]) for name in names)
        print(
            f"{names[0]}: {alone:.2f} s for {tp} ranks; {names[1]}: {together:.2f} s for {dp * tp} ranks; "
            f"ratio {together / alone:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
