"""Pipeline stages of a Llama-3-8B shape on several GPUs of one host, alone and with tensor parallelism, against one.

    a prompt    64k tokens to the first token: one GPU in one piece and in its default pieces, the stages in theirs
    decode      rows in as many groups as there are stages, which take turns: new tokens of all rows per second, over
                those of one GPU with 8 rows at its best (node by node, compiled and captured)

bfloat16, weights drawn on the devices. On each GPU all of the model runs besides, in turn with the plan; the slowest
rank counts, of the rounds the median. `=` or `!` says whether the plan's tokens are those of one GPU (bfloat16 rounds:
they may part).

    python -m benchmarks.gpu.pipeline --ranks 2                      pp=2
    python -m benchmarks.gpu.pipeline --ranks 4                      pp=4, and tp=2,pp=2
    python -m benchmarks.gpu.pipeline --ranks 8 --plan tp=2,pp=4
    python -m benchmarks.gpu.pipeline --ranks 2 --device cpu --small --rounds 1
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once

import torch
from torch import Tensor

from benchmarks.support.decoders import DrawnWeights, decoder
from benchmarks.support.several import (
    DeviceTurns,
    device_name,
    device_of_rank,
    options,
    sharing,
    start,
    synchronize,
)
from partitioner import Plan, partition
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.pipeline.schedule import groups_of

PLANS = {
    2: ("pp=2",),
    4: ("pp=4", "tp=2,pp=2"),
    8: ("pp=8", "tp=2,pp=4", "tp=4,pp=2"),
}
ROWS, FEW, MANY, SHORT = 8, 8, 72, 128


def alone(parts: Any, weights: DrawnWeights, device: torch.device, **made: bool) -> Engine:
    return Engine(
        parts.rank(0), ThreadGroup(parts.mesh).communicator(0), weights=weights, device=device,
        entries=lambda entry: parts.entry(entry, 0), **made,
    )  # fmt: skip


def writes(engine: Engine, ids: Tensor, count: int, **given: int) -> Callable[[], Tensor]:
    return lambda: engine.generate(ids, max_new_tokens=count, eos_token_id=[], do_sample=False, **given)  # type: ignore[return-value]


@torch.no_grad()
def rank(given: argparse.Namespace) -> None:
    device, plan = device_of_rank(given), Plan.parse(given.part)
    shape, tokens = ("small", given.tokens or 256) if given.small else ("8b", given.tokens or 65536)
    model = decoder(shape, layers=given.layers, positions=max(tokens, SHORT) + 2 * MANY, device=device)
    weights, whole = DrawnWeights(model, device), partition(model, Plan())
    one = alone(whole, weights, device)
    captured = alone(whole, weights, device, compile=True, cuda_graph=True) if device.type == "cuda" else None
    parts = partition(model, plan)
    with Engine.connect(parts, weights, device=device.type, timeout_s=300, shared_memory=sharing(device)) as split:
        turns, first = DeviceTurns(device), split.program.rank == 0
        if first:
            layers = model.config.num_hidden_layers
            print(f"{plan}: {given.ranks} x {device_name(device)}, shape {shape}, {layers} layers", flush=True)
        prompt(given, turns, one, split, tokens, model.config.vocab_size, first=first)
        decode(given, turns, one, captured, split, plan, model.config.vocab_size, first=first)
        synchronize(device)
        if captured is not None:
            captured._generate_loop.release()  # what it has captured goes before the groups


def drawn_ids(rows: int, tokens: int, vocabulary: int, device: torch.device) -> Tensor:
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(rows)).to(device)


def prompt(
    given: argparse.Namespace, turns: DeviceTurns, one: Engine, split: Engine, tokens: int, vocabulary: int,
    *, first: bool,
) -> None:  # fmt: skip
    ids = drawn_ids(1, tokens, vocabulary, turns.device)
    times = turns.medians(
        {
            "1 GPU, one piece": writes(one, ids, 1, prefill_step=tokens),
            "1 GPU": writes(one, ids, 1),
            "stages": writes(split, ids, 1),
        },
        rounds=max(1, given.rounds // 2),
    )
    best = min(seconds for name, seconds in times.items() if name != "stages")
    if first:
        said = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in times.items())
        print(f"  first token of {tokens}: {said}; one at its best / stages {best / times['stages']:.2f}", flush=True)


def decode(
    given: argparse.Namespace, turns: DeviceTurns, one: Engine, captured: Engine | None, split: Engine, plan: Plan,
    vocabulary: int, *, first: bool,
) -> None:  # fmt: skip
    engines = {"node by node": one, **({} if captured is None else {"captured": captured})}
    speed: dict[tuple[str, int], float] = {}
    few, many = (2, 8) if given.small else (FEW, MANY)
    for groups in sorted({1, 2, 3, plan.pp}):
        rows = ROWS * groups
        ids = drawn_ids(rows, 8 if given.small else SHORT, vocabulary, turns.device)
        contestants = {**engines, "stages": split}
        calls = {
            f"{name} {count}": writes(engine, ids, count)
            for name, engine in contestants.items()
            for count in (few, many)
        }
        times = turns.medians(calls, rounds=given.rounds)
        for name in contestants:
            speed[name, rows] = rows * (many - few) / (times[f"{name} {many}"] - times[f"{name} {few}"])
        same = bool(torch.equal(writes(one, ids, few)(), writes(split, ids, few)()))
        base = max(speed[name, ROWS] for name in engines)
        if first:
            said = ", ".join(f"{name} {speed[name, rows]:.0f}" for name in contestants)
            used = sum(part.stop > part.start for part in groups_of(rows, plan.pp))
            print(
                f"  decode, {rows} rows in {used} groups: tokens per second {said}; stages / one GPU with {ROWS} rows "
                f"{speed['stages', rows] / base:.2f}, with {rows} "
                f"{speed['stages', rows] / max(speed[name, rows] for name in engines):.2f} {'=' if same else '!'}",
                flush=True,
            )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--tokens", type=int, help="of the prompt; 65536, and 256 with --small")
    parser.add_argument("--plan", nargs="+", help="instead of those for so many ranks")
    given = parser.parse_args()
    start(
        "benchmarks.gpu.pipeline", given, parts=given.plan or PLANS.get(given.ranks, (f"pp={given.ranks}",)), rank=rank
    )


if __name__ == "__main__":
    main()
