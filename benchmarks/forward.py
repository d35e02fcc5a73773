"""One forward pass: the emitted graph against transformers, in one process and split over two.

    one process    Engine at tp=1                    against  model(input_ids, use_cache=False), sdpa attention
    two processes  Engine at tp=2, shared memory     against  transformers' tp_plan="auto",
                   (one thread each)                          DTensor (parallelize_module, column- and row-wise),
                                                              and the model in one process

Llama-shaped models with random weights (fixed seeds), float32, CPU, no KV cache; inputs of one token, the size of a
decode step, and of some hundred. The contestants take turns in the same processes, and what is printed is the ratio of
the medians, ours / theirs: below 1 we are faster. In brackets are the quartiles of that ratio within a round, then the
ratio of the fastest rounds, which a busy machine disturbs least. Every contestant's logits are compared with those of
the model. Without accelerate, which transformers' tp_plan needs, that contestant is left out.

    python -m benchmarks.forward                     both, about three minutes
    python -m benchmarks.forward --only two          the second part
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch import distributed as dist
from transformers import LlamaForCausalLM

from benchmarks.support.peers import (
    ALONE,
    AUTO,
    DTENSOR,
    OURS,
    TWO,
    build,
    dtensor,
    milliseconds,
    of_best,
    tp_plan_auto,
)
from benchmarks.support.ranks import launch_ranks
from benchmarks.support.rounds import Ratio, rounds_in, take_turns
from partitioner import Plan, partition
from partitioner.cli.common.tables import print_table
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.processes.launch import begin_worker

Run = Callable[[], Tensor]

ONE = {
    "hidden 512, 8 layers": {
        "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 1376, "vocab_size": 4096,
    },
    "hidden 2048, 4 layers": {
        "hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8,
        "intermediate_size": 5504, "vocab_size": 4096,
    },
}  # fmt: skip
ONE_LENGTHS = (1, 512)
TWO_LENGTHS = (1, 128)
TOLERANCE = 1e-4  # float32, relative to the largest logit

console = Console(width=None if sys.stdout.isatty() else 110)


def tokens(length: int) -> Tensor:
    return torch.randint(0, 4096, (1, length), generator=torch.Generator().manual_seed(length))


def eager(model: Any, ids: Tensor) -> Run:
    return lambda: model(input_ids=ids, use_cache=False).logits


def emitted(engine: Engine, ids: Tensor) -> Run:
    return lambda: engine(input_ids=ids)


def require_equal(name: str, found: Tensor, expected: Tensor) -> None:
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        sys.exit(f"{name} computes something else: relative error {error:.1e}")


# -- one process -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_process(seconds: float) -> None:
    table = Table()
    for column in ("model", "tokens", "ours ms", "transformers ms", "ratio", "of best"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name, sizes in ONE.items():
        model = build(sizes)
        parts = partition(model, Plan())
        engine = parts.engine(0, ThreadGroup(Mesh.of()).communicator(0))
        for length in ONE_LENGTHS:
            ids = tokens(length)
            contestants: dict[str, Run] = {OURS: emitted(engine, ids), ALONE: eager(model, ids)}
            require_equal(OURS, contestants[OURS](), contestants[ALONE]())
            times = take_turns(contestants, rounds=rounds_in(seconds, contestants))
            ratio = Ratio.of(times[OURS], times[ALONE])
            both = (milliseconds(times[OURS]), milliseconds(times[ALONE]))
            table.add_row(name, str(length), *both, str(ratio), of_best(times[OURS], times[ALONE]))
    print_table("one process, one thread: ours / transformers", table)


# -- two processes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def rank_main(folder: Path, seconds: float) -> None:
    """One of the two ranks: every contestant lives in both."""
    begin_worker()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    alone = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    # our weights are slices of their own; the other three load the checkpoint for themselves
    with Engine.connect(partition(alone, Plan(tp=2))) as engine:
        rank = engine.program.rank
        auto = tp_plan_auto(folder)
        parallel = dtensor(LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval())
        found: dict[str, dict[str, list[float]]] = {}
        for length in TWO_LENGTHS:
            ids = tokens(length)
            contestants: dict[str, Run] = {
                ALONE: eager(alone, ids) if rank == 0 else lambda: torch.empty(0),  # the other rank waits
                OURS: emitted(engine, ids),
                DTENSOR: eager(parallel, ids),
            }
            if auto is not None:
                contestants[AUTO] = eager(auto, ids)
            results = {name: run() for name, run in contestants.items()}
            if rank == 0:
                for name, result in results.items():
                    require_equal(name, result, results[ALONE])
            rounds = torch.tensor(rounds_in(seconds, contestants, meet=dist.barrier))
            dist.broadcast(rounds, 0)
            found[str(length)] = take_turns(contestants, rounds=int(rounds), meet=dist.barrier)
        if rank == 0:
            (folder / "times.json").write_text(json.dumps(found))


def two_processes(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        transformers.utils.logging.disable_progress_bar()
        build(TWO).save_pretrained(folder)
        launch_ranks(["benchmarks.forward", "--rank", folder, "--seconds", str(seconds)], num_ranks=2, timeout_s=300)
        found = json.loads(Path(folder, "times.json").read_text())
    title = "two processes: hidden 1024, 8 layers"
    table = Table()
    for column in ("tokens", "contestant", "ms", "ours / it", "of best"):
        table.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
    for length, times in found.items():
        table.add_section()
        for name, of_one in times.items():
            ratios = (str(Ratio.of(times[OURS], of_one)), of_best(times[OURS], of_one)) if name != OURS else ()
            table.add_row(length, name, milliseconds(of_one), *ratios)
    print_table(title, table)
    if AUTO not in found[str(TWO_LENGTHS[0])]:
        console.print(f"left out: transformers' {AUTO}, which needs accelerate (pip install accelerate)", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="One forward pass, against transformers.")
    parser.add_argument("--only", choices=["one", "two"])
    parser.add_argument("--seconds", type=float, default=15.0, help="per case; at least 5 rounds are run")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.rank is not None:
        rank_main(given.rank, given.seconds)
        return
    if given.only != "two":
        one_process(given.seconds)
    if given.only != "one":
        two_processes(given.seconds)


if __name__ == "__main__":
    main()
