"""Pipeline stages of a Llama-3-8B shape on several GPUs of one host, alone and with tensor parallelism, against one.

    a prompt    64k tokens to the first token: one GPU in one piece, in its default pieces and in pieces of `--steps`,
                the stages, cut for prompts (`pipeline.balance=prefill`), in theirs
    decode      8 rows in each of as many groups as there are stages, and one more, which take turns: new tokens of all
                rows per second, over those of one GPU with 8 rows
    a stage     its captured step by itself, without the others: the mean over the slowest is what the cut leaves

Both sides run compiled and captured decode steps. bfloat16, weights drawn on the devices. On each GPU all of the model
runs besides, in turn with the plan; the slowest rank counts, of the rounds the median. bfloat16 rounds: where a row of
the plan parts from one GPU's, the logits of the two tokens are compared, as one GPU has them behind the same text, and
beside them stands how far apart two bfloat16 numbers of that size are.

    python -m benchmarks.gpu.pipeline --ranks 2                      pp=2
    python -m benchmarks.gpu.pipeline --ranks 4                      pp=4, and tp=2,pp=2
    python -m benchmarks.gpu.pipeline --ranks 8 --plan tp=2,pp=4
    python -m benchmarks.gpu.pipeline --ranks 2 --only prompt --steps 2048 4096
    python -m benchmarks.gpu.pipeline --ranks 2 --device cpu --small --rounds 1
"""

from __future__ import annotations

import argparse
import math
import os
import time
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
    if os.environ["RANK"] == "0":
        layers = model.config.num_hidden_layers
        print(f"{plan}: {given.ranks} x {device_name(device)}, shape {shape}, {layers} layers", flush=True)
    if given.only != "decode":
        parts = partition(model, Plan.parse(f"{given.part},pipeline.balance=prefill"))
        with connected(parts, weights, device) as split:
            prompt(given, DeviceTurns(device), alone(whole, weights, device), split, tokens, model.config.vocab_size)
    if given.only != "prompt":
        # compiled and captured on GPUs; on a CPU, whose compiler takes longer than all the rest, node by node
        how = {"compile": True, "cuda_graph": True} if device.type == "cuda" else {}
        one = alone(whole, weights, device, **how)
        with connected(partition(model, plan), weights, device, **how) as split:
            decode(given, DeviceTurns(device), one, split, plan, model.config.vocab_size)
            synchronize(device)
        one._generate_loop.release()


def connected(parts: Any, weights: DrawnWeights, device: torch.device, **how: bool) -> Engine:
    return Engine.connect(parts, weights, device=device.type, timeout_s=300, shared_memory=sharing(device), **how)


def drawn_ids(rows: int, tokens: int, vocabulary: int, device: torch.device) -> Tensor:
    return torch.randint(0, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(rows)).to(device)


def how_alike(one: Engine, expected: Tensor, found: Tensor) -> str:
    """Whether the rows [B, L] are one GPU's, and how near the two tokens were to each other where they first part."""
    parted = [row for row in range(len(expected)) if not torch.equal(expected[row], found[row])]
    if not parted:
        return "the same tokens"
    apart, spacing = 0.0, 0.0
    for row in parted:
        at = int((expected[row] != found[row]).nonzero()[0])
        logits = one(input_ids=expected[row : row + 1, :at])[0, -1].float()
        two = logits[[int(expected[row, at]), int(found[row, at])]]
        if abs(float(two[0] - two[1])) >= apart:
            apart = abs(float(two[0] - two[1]))
            spacing = float(two.abs().max()) * torch.finfo(torch.bfloat16).eps
    return (
        f"{len(parted)} of {len(expected)} rows part from one GPU's, by logits at most {apart:.4f} apart, where "
        f"bfloat16 has steps of {spacing:.4f}"
    )


def prompt(
    given: argparse.Namespace, turns: DeviceTurns, one: Engine, split: Engine, tokens: int, vocabulary: int
) -> None:
    ids = drawn_ids(1, tokens, vocabulary, turns.device)
    contestants = {
        "1 GPU, one piece": writes(one, ids, 1, prefill_step=tokens),
        "1 GPU": writes(one, ids, 1),
        "stages": writes(split, ids, 1),
    }
    for step in given.steps:
        contestants[f"1 GPU, {step}"] = writes(one, ids, 1, prefill_step=step)
        contestants[f"stages, {step}"] = writes(split, ids, 1, prefill_step=step)
    times = turns.medians(contestants, rounds=max(1, given.rounds // 2))
    best, pieces = (
        min(seconds for name, seconds in times.items() if name.startswith(of)) for of in ("1 GPU", "stages")
    )
    said = contestants["1 GPU"](), contestants["stages"]()
    alike = how_alike(one, *said)
    if split.program.rank == 0:
        each = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in times.items())
        print(
            f"  first token of {tokens}: {each}; one at its best / stages by default {best / times['stages']:.3f}, at "
            f"their best {best / pieces:.3f}; {alike}",
            flush=True,
        )


def decode(
    given: argparse.Namespace, turns: DeviceTurns, one: Engine, split: Engine, plan: Plan, vocabulary: int
) -> None:
    few, many = (2, 8) if given.small else (FEW, MANY)
    length = 8 if given.small else SHORT
    calls = {}
    for groups in (1, plan.pp, plan.pp + 1):
        ids = drawn_ids(ROWS * groups, length, vocabulary, turns.device)
        engine, shared = (one, {}) if groups == 1 else (split, {"pipeline_groups": groups})
        calls |= {(groups, count): writes(engine, ids, count, **shared) for count in (few, many)}
    times = turns.medians({str(call): run for call, run in calls.items()}, rounds=given.rounds)
    per_step = {groups: (times[str((groups, many))] - times[str((groups, few))]) / (many - few) for groups, _ in calls}
    # not beside the others' rows: another number of rows is another product, which rounds otherwise
    ids = drawn_ids(ROWS * plan.pp, length, vocabulary, turns.device)
    expected = torch.cat([writes(one, rows, few)() for rows in ids.split(ROWS)])
    alike = how_alike(one, expected, writes(split, ids, few)())
    stages = turns.of_all(stage_seconds(split, turns.device))
    if split.program.rank == 0:
        print(f"  decode, one GPU, {ROWS} rows: {per_step[1] * 1e3:.3f} ms per step", flush=True)
        for groups in (plan.pp, plan.pp + 1):
            ratio = groups * per_step[1] / per_step[groups]
            print(
                f"  decode, {groups} groups of {ROWS}: {per_step[groups] / groups * 1e3:.3f} ms per group's step, "
                f"{ROWS * groups / per_step[groups]:.0f} tokens per second; over one GPU with {ROWS} rows {ratio:.3f}",
                flush=True,
            )
        alone = "not measured, without a captured step of its own"
        if not math.isnan(stages[0]):
            took = ", ".join(f"{seconds * 1e3:.3f}" for seconds in stages)
            alone = f"{took} ms; mean over slowest {sum(stages) / len(stages) / max(stages):.3f}"
        print(f"  a stage alone: {alone}; {plan.pp} groups: {alike}", flush=True)


def stage_seconds(split: Engine, device: torch.device) -> float:
    """One group's step on this rank's stage, without what comes and goes."""
    steps = split._generate_loop._bound
    assert steps is not None
    if not steps.decodes_from_fixed_memory or steps.shares_head:
        return float("nan")
    member = steps.decoder(ROWS, slice(0, ROWS))
    tokens, count = [1] * ROWS, 50
    best = float("inf")
    for _ in range(5):
        member.begin_turns(lambda logits: logits, tokens, [SHORT] * ROWS)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            member.turn()
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / count)
    return best


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--tokens", type=int, help="of the prompt; 65536, and 256 with --small")
    parser.add_argument("--only", choices=("prompt", "decode"))
    parser.add_argument("--steps", nargs="*", type=int, default=[], help="tokens of a prompt that run at a time")
    parser.add_argument("--plan", nargs="+", help="instead of those for so many ranks")
    given = parser.parse_args()
    start(
        "benchmarks.gpu.pipeline", given, parts=given.plan or PLANS.get(given.ranks, (f"pp={given.ranks}",)), rank=rank
    )


if __name__ == "__main__":
    main()
