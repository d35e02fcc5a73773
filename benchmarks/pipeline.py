"""Pipeline stages in two processes against one, and against what the machine lets two processes do.

    c                    how much two processes get done that run a stage each at the same time, over one of them alone:
                         2 without a shared memory bus
    whole texts          m rows in m pieces; both stages are busy m / (m + 1) of the time: c x m / (m + 1) is the most
    in pieces            what one process takes for these pieces one after the other, over all rows at once: products of
                         few rows are done at a lower rate, with stages or without
    transformers         pp_size=2: even layer counts, nothing in flight, logits broadcast
    decode               new tokens per second of two groups of 8 rows in a ring, over those of 8 rows in one process,
                         which reads its weights for as many at a time; of all, from the first token on. The most is a
                         c of its own, of steps: of two processes that write with half of the layers each at the same
                         time, over one of them alone
    one prompt           in chunks, to its first token

Is that c the most that two stages can do? Each of the two processes has what a stage has: half of the layers, 8 rows at
a time, as many tokens in its cache, one thread, and the other beside it on the memory bus. What does not go by halves
is against the ring: an embedding, the head and the choice of tokens are there once in a step of one process, and stand
on one stage, as does what the host does for each step besides; so do the first and the last slot, in which one of the
stages has no group yet: 1 / (2 x tokens) of the time.

A Llama-shaped model with random weights (fixed seed), hidden 512, 8 layers, float32, one thread per process. The
contestants take turns in the same processes. Printed are ratios to one process; in brackets what share of the most that
is. How long the stages are idle stands beside it, of runs that are profiled:

    if equal             1 / (m + 1), of stages and pieces that all take as long
    computed             by the schedule, from what each stage spent on each piece
    measured             the time in which ranks had nothing to do (`runtime/pipeline/measured.py`)

Computed is less than if equal where two processes share a memory bus: the first piece and the last one run while the
other stage is idle, and are the quicker for it. Measured is more than computed by what a message takes to be noticed.

    python -m benchmarks.pipeline                      about three minutes on an idle machine
    python -m benchmarks.pipeline --rounds 3 --tokens 8
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import distributed as dist
from transformers import LlamaForCausalLM

from benchmarks.support.peers import build
from benchmarks.support.ranks import launch_ranks
from benchmarks.support.rounds import Took, take_turns
from partitioner import Plan, partition
from partitioner.cli.common.tables import print_table
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.pipeline.links import sizes_of
from runtime.pipeline.measured import measured
from runtime.pipeline.schedule import Timelines, bubble, chain, ring
from runtime.pipeline.timing import time_of
from runtime.processes.launch import begin_worker

SIZES = {
    "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1376, "vocab_size": 256,
}  # fmt: skip
TOKENS, PIECES, LONG = 96, (4, 8, 16), 1024
STARTS = ("model.layers.4",)
GROUPS = 2
"""Of 8 rows, in decode."""

console = Console(width=None if sys.stdout.isatty() else 130)


def wait() -> None:
    """What the other rank does while one runs alone."""


def peer(folder: Path) -> Any:
    """Transformers' own pipeline; None where this version has none, or it does not run here."""
    try:
        from transformers.distributed import DistributedConfig

        return LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=2)).eval()
    except Exception as error:
        return str(error)


def row_by_row(engine: Engine, rows: torch.Tensor) -> None:
    for row in rows:
        engine(input_ids=row[None])


def steps_of(engine: Engine, rows: torch.Tensor, tokens: int) -> Took:
    """The steps behind the first token, `tokens` of each row."""
    steps = engine.stream(rows, eos_token_id=[], max_new_tokens=tokens + 1)
    next(steps)
    start = time.perf_counter()
    for _ in steps:
        pass
    return Took(time.perf_counter() - start)


def stage_alone(engine: Engine, ids: torch.Tensor) -> Callable[[], object]:
    """The rank's own stage on one piece, with nobody to wait for."""
    staged: Any = engine._run
    inputs = engine.program.inputs
    values = [
        ids if given.name == "input_ids" else torch.arange(ids.shape[1])[None].expand(ids.shape) for given in inputs
    ]
    sizes = sizes_of(inputs, values)
    received = [
        torch.rand([sizes[dim] if isinstance(dim, str) else dim for dim in crossing.shape])
        for crossing in staged.stage.receives
    ]
    return lambda: staged.executable([*values, *received])


def idle_of(engine: Engine, run: Callable[[], object], timelines: Callable[[int], Timelines]) -> tuple[float, float]:
    """Computed and measured, of one run. timelines: of so many runs of a stage's graph."""
    with engine.profile(by_node=False) as trace:
        run()
    found = measured(trace.ranks)
    return time_of(timelines(len(found.seconds[0])), found.seconds).bubble, found.bubble


def of_decode(runs: int) -> Timelines:
    """Each group's prompt in a chain, then the ring; in its last slot the first stage has nothing to run any more."""
    first, last = ring(2, GROUPS, runs - GROUPS + 1)
    prompts = chain(2, GROUPS)
    return (*prompts[0], *first[:-2], first[-1]), (*prompts[1], *last)


@torch.no_grad()
def rank_main(folder: Path, rounds: int, tokens: int) -> None:
    """One of the two ranks: every contestant lives in both."""
    begin_worker()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    parts = partition(model, Plan(pp=2, passes=[("pipeline", {"stage_starts": STARTS})]))
    whole = partition(model, Plan())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, SIZES["vocab_size"], (max(PIECES), TOKENS), generator=generator)
    long = torch.randint(0, SIZES["vocab_size"], (1, LONG), generator=generator)
    with Engine.connect(parts, timeout_s=300) as engine:
        rank = engine.program.rank
        alone = Engine(whole.rank(0), ThreadGroup(whole.mesh).communicator(0), entries=lambda e: whole.entry(e, 0))
        expected, found = alone(input_ids=rows[:4]), engine(input_ids=rows[:4])
        if found is not None and not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
            sys.exit("the stages' logits are not the model's")
        piece = stage_alone(engine, rows[:1])
        contestants: dict[str, Callable[[], object]] = {
            "stage": piece if rank == 0 else wait,
            "stages": piece,
        }
        theirs = peer(folder)
        for m in PIECES:
            contestants[f"one {m}"] = (lambda m=m: alone(input_ids=rows[:m])) if rank == 0 else wait  # type: ignore[misc]
            contestants[f"two {m}"] = lambda m=m: engine(input_ids=rows[:m])  # type: ignore[misc]
            contestants[f"pieces {m}"] = (lambda m=m: row_by_row(alone, rows[:m])) if rank == 0 else wait  # type: ignore[misc]
            if not isinstance(theirs, str):
                contestants[f"peer {m}"] = lambda m=m: theirs(input_ids=rows[:m], use_cache=False)  # type: ignore[misc]
        new: Any = {"eos_token_id": []}
        first = {**new, "max_new_tokens": 1, "prefill_step": LONG // 8}
        contestants["one prompt"] = (
            (lambda: alone.generate(long, **{**first, "prefill_step": LONG})) if rank == 0 else wait
        )
        contestants["two prompt"] = lambda: engine.generate(long, **first)
        if rank == 0:
            contestants["one prompt, chunks"] = lambda: alone.generate(long, **first)
        else:
            contestants["one prompt, chunks"] = wait
        contestants["one decode"] = (lambda: steps_of(alone, rows[:8, :4], tokens)) if rank == 0 else wait
        contestants["two decode"] = lambda: steps_of(engine, rows[: 8 * GROUPS, :4], tokens)
        # a stage's steps by themselves: half of the layers, each process its own
        half = partition(build({**SIZES, "num_hidden_layers": SIZES["num_hidden_layers"] // 2}), Plan())
        own = Engine(half.rank(0), ThreadGroup(half.mesh).communicator(0), entries=lambda e: half.entry(e, 0))
        contestants["stages decode"] = lambda: steps_of(own, rows[:8, :4], tokens)
        contestants["stage decode"] = contestants["stages decode"] if rank == 0 else wait
        idle: dict[str, list[tuple[float, float]]] = {}
        for name in [name for name in contestants if name.startswith("two ")]:
            timelines = of_decode if name == "two decode" else functools.partial(chain, 2)
            contestants[f"idle {name}"] = functools.partial(
                lambda name, run, of: idle.setdefault(name, []).append(idle_of(engine, run, of)),
                name, contestants[name], timelines,
            )  # fmt: skip
        take_turns(contestants, rounds=1, meet=dist.barrier)
        idle.clear()
        times = take_turns(contestants, rounds=rounds, meet=dist.barrier)
        dist.barrier()
        if rank == 0:
            Path(folder, "idle.json").write_text(json.dumps(idle))
        # a stage that ends early has not ended the run: the last stage's time counts
        Path(folder, f"times{rank}.json").write_text(json.dumps(times))
        if rank == 0 and isinstance(theirs, str):
            Path(folder, "left_out.txt").write_text(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pipeline stages in two processes.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.rank is not None:
        rank_main(given.rank, given.rounds, given.tokens)
        return
    before, began = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        transformers.utils.logging.disable_progress_bar()
        build(SIZES).save_pretrained(folder)
        arguments = ["--rank", folder, "--rounds", str(given.rounds), "--tokens", str(given.tokens)]
        launch_ranks(["benchmarks.pipeline", *arguments], num_ranks=2, timeout_s=1800)
        ranks = [json.loads(Path(folder, f"times{rank}.json").read_text()) for rank in range(2)]
        left_out = Path(folder, "left_out.txt")
        reason = left_out.read_text() if left_out.exists() else ""
        idle = json.loads(Path(folder, "idle.json").read_text())
    report({name: list(map(max, *(rank[name] for rank in ranks))) for name in ranks[0]}, idle, reason)
    console.print(
        f"load {before:.1f} before it began, on {os.cpu_count()} cores; {time.perf_counter() - began:.0f} s",
        markup=False,
    )


def report(times: dict[str, list[float]], idle: dict[str, list[tuple[float, float]]], left_out: str) -> None:
    """Of the medians, and of the fastest rounds. idle: computed and measured shares of each round."""

    def idle_in(name: str) -> list[str]:
        return [f"{statistics.median(shares):.1%}" for shares in zip(*idle[name], strict=True)]

    middle = {name: statistics.median(of_one) for name, of_one in times.items()}
    best = {name: min(of_one) for name, of_one in times.items()}
    c, of_steps = (
        {kind: 2 * found["stage" + of] / found["stages" + of] for kind, found in (("median", middle), ("best", best))}
        for of in ("", " decode")
    )
    console.print(
        f"c, two stages at a time over one alone: {c['median']:.2f} (fastest rounds {c['best']:.2f}); of steps of 8 "
        f"rows {of_steps['median']:.2f} ({of_steps['best']:.2f})"
    )
    table = Table()
    for column in (
        "",
        "median",
        "of the most",
        "fastest",
        "of the most",
        "in pieces",
        "one / transformers",
        "idle: if equal",
        "computed",
        "measured",
    ):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for m in PIECES:
        cells = []
        for kind, found in (("median", middle), ("best", best)):
            ratio = found[f"one {m}"] / found[f"two {m}"]
            cells += [f"{ratio:.2f}", f"{ratio / (c[kind] * m / (m + 1)):.0%}"]
        pieces = f"{middle[f'pieces {m}'] / middle[f'one {m}']:.2f}"
        theirs = f"{middle[f'one {m}'] / middle[f'peer {m}']:.2f}" if f"peer {m}" in middle else ""
        table.add_row(f"{m} pieces", *cells, pieces, theirs, f"{bubble(2, m):.1%}", *idle_in(f"two {m}"))
    for name, of, most, done in (("prompt", c, 8 / 9, 1), ("decode", of_steps, 1.0, GROUPS)):
        cells = []
        for kind, found in (("median", middle), ("best", best)):
            ratio = done * found[f"one {name}"] / found[f"two {name}"]
            cells += [f"{ratio:.2f}", f"{ratio / (of[kind] * most):.0%}"]
        title = {"prompt": "one prompt in 8 chunks", "decode": f"decode, {GROUPS} groups of 8"}[name]
        equal = f"{bubble(2, 8):.1%}" if name == "prompt" else ""
        table.add_row(title, *cells, "", "", equal, *idle_in(f"two {name}"))
    print_table("one process / ours: how many times faster", table)
    if left_out:
        console.print(f"left out: transformers' pp_size=2: {left_out[:200]}", markup=False)


if __name__ == "__main__":
    main()
