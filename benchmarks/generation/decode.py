"""One decoded token, with a KV cache, split over two processes.

    ours                 Engine.generate at tp=2 through shared memory, greedy
    ours, gloo           the same over gloo
    tp_plan="auto"       transformers' own tensor parallelism, DynamicCache
    DTensor              parallelize_module, column- and row-wise, DynamicCache
    one process          the model by itself, DynamicCache: half of its time is what two processes could reach

A Llama-shaped model with random weights (fixed seed), hidden 1024, 8 layers, float32, CPU, one thread per process,
after a prompt of 128 tokens. The contestants take turns, one token each, in the same processes; every one's tokens are
compared with those of the model. Printed is the ratio of the medians, ours / theirs: below 1 we are faster. In brackets
are the quartiles of that ratio within a round, then the ratio of the fastest rounds.

    python -m benchmarks.generation.decode                      about a minute
    python -m benchmarks.generation.decode --tokens 200
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
from transformers import DynamicCache, LlamaForCausalLM

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
from benchmarks.support.rounds import Ratio, take_turns
from partitioner import Plan, partition
from partitioner.cli.common.tables import print_table
from runtime.communication.process_groups import ProcessGroups
from runtime.engine import Engine
from runtime.processes.launch import begin_worker

PROMPT = 128
OURS_GLOO = f"{OURS}, gloo"

console = Console(width=None if sys.stdout.isatty() else 110)


class Greedy:
    """transformers' model, a token at a time."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model, self.cache = model, DynamicCache()
        self.token = self._run(prompt)
        self.said = [int(self.token)]

    def __call__(self) -> Tensor:
        self.token = self._run(self.token)
        self.said.append(int(self.token))
        return self.token

    def _run(self, ids: Tensor) -> Tensor:
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        found: Tensor = output.logits[:, -1:].argmax(-1)
        return found


class Ours:
    """Our engine, a token at a time."""

    def __init__(self, engine: Engine, prompt: Tensor, tokens: int) -> None:
        self.steps = engine.stream(prompt, max_new_tokens=tokens + 2, eos_token_id=[])
        self.said: list[int | None] = []
        self()

    def __call__(self) -> Tensor:
        self.said.append(next(self.steps).tokens[0])
        return torch.empty(0)


@torch.no_grad()
def rank_main(folder: Path, tokens: int) -> None:
    """One of the two ranks: every contestant lives in both."""
    begin_worker()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    alone = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    prompt = torch.randint(0, TWO["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    parts = partition(alone, Plan(tp=2))
    with Engine.connect(parts, shared_memory="on") as engine:
        rank = engine.program.rank
        gloo = ProcessGroups.connect(parts.mesh, shared_memory="off")
        over_gloo = Engine(parts.rank(rank), gloo, entries=lambda entry: parts.entry(entry, rank))
        auto = tp_plan_auto(folder)
        parallel = dtensor(LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval())
        contestants: dict[str, Callable[[], Tensor]] = {
            ALONE: Greedy(alone, prompt) if rank == 0 else lambda: torch.empty(0),  # the other rank waits
            OURS: Ours(engine, prompt, tokens),
            OURS_GLOO: Ours(over_gloo, prompt, tokens),
            DTENSOR: Greedy(parallel, prompt),
        }
        if auto is not None:
            contestants[AUTO] = Greedy(auto, prompt)
        times = take_turns(contestants, rounds=tokens, meet=dist.barrier)
        if rank == 0:
            said = {name: contestant.said for name, contestant in contestants.items()}  # type: ignore[attr-defined]
            for name, found in said.items():
                if found != said[ALONE]:
                    sys.exit(f"{name} says something else than the model: {found} and {said[ALONE]}")
            (folder / "times.json").write_text(json.dumps(times))


def main() -> None:
    parser = argparse.ArgumentParser(description="One decoded token, against transformers and DTensor.")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.rank is not None:
        rank_main(given.rank, given.tokens)
        return
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        transformers.utils.logging.disable_progress_bar()
        build(TWO).save_pretrained(folder)
        launch_ranks(
            ["benchmarks.generation.decode", "--rank", folder, "--tokens", str(given.tokens)],
            num_ranks=2,
            timeout_s=600,
        )
        times = json.loads(Path(folder, "times.json").read_text())
    title = f"two processes: hidden 1024, 8 layers, one token after {PROMPT} and more"
    table = Table()
    for column in ("contestant", "ms", "ours / it", "of best"):
        table.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
    for name, of_one in times.items():
        ratios = (str(Ratio.of(times[OURS], of_one)), of_best(times[OURS], of_one)) if name != OURS else ()
        table.add_row(name, milliseconds(of_one), *ratios)
    print_table(title, table)
    half = min(times[OURS]) / (min(times[ALONE]) / 2)
    console.print(f"half of one process's time is {half:.2f} times less than ours (fastest rounds)", markup=False)
    console.print(f"load {before:.1f} before it began, on {os.cpu_count()} cores", markup=False)
    if AUTO not in times:
        console.print(f"left out: transformers' {AUTO}, which needs accelerate (pip install accelerate)", markup=False)


if __name__ == "__main__":
    main()
