"""What each stage of a Llama-3-8B shape takes on one GPU, one after the other, and what the schedules make of that.

    decode      the captured step of 8 rows of the whole model, and of each stage: mean over slowest; tokens per second
                of as many groups as stages, and of one more, over one GPU with one group, computed by the relay
    a prompt    64k tokens in the chunks that stages run (cut for prompts), each on each stage: the chain's first token
                against the whole model's in one piece, in its default pieces, and in the same chunks

Nothing is sent: a transfer is assumed to take `--transfer` microseconds.

    python -m benchmarks.gpu.stages                      about a minute and a half; --compile: some more
    python -m benchmarks.gpu.stages --pp 4 --only decode
    python -m benchmarks.gpu.stages --device cpu --small
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once

import torch

from benchmarks.support.decoders import DrawnWeights, decoder
from benchmarks.support.several import device_name, synchronize
from partitioner import Plan, partition
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.execution.prompts.piece import Piece
from runtime.generation.steps import Steps
from runtime.kv_cache.sharded_cache import cache_for
from runtime.pipeline.chunks import chunk_ends
from runtime.pipeline.links import shape_of
from runtime.pipeline.schedule import chain, relay
from runtime.pipeline.timing import time_of
from runtime.sampling.sampler import Sampler
from runtime.sampling.sampling_options import Sampling

ROWS, SHORT, DEFAULT_STEP = 8, 128, 16384


def steps_of(
    parts: Any, rank: int, weights: DrawnWeights, device: torch.device, *, rows: int, length: int, step: int,
    **how: bool,
) -> tuple[Steps, Sampler]:  # fmt: skip
    """A rank's programs over a cache of its own, without the other ranks; and what chooses from its logits."""
    communicator = ThreadGroup(parts.mesh).communicator(rank)
    engine = Engine(
        parts.rank(rank), communicator, weights=weights, device=device, entries=lambda entry: parts.entry(entry, rank),
        **how,
    )  # fmt: skip
    loop = engine._generate_loop
    program = loop.program
    cache = cache_for(program, max_batch=rows, max_length=length, step=step, device=device)
    sampler = Sampler(
        Sampling(), communicator, vocab_size=program.vocab_size, owned=program.vocabulary,
        axis=program.vocabulary_axes, device=device,
    )  # fmt: skip
    return Steps(loop._prefill_by, loop._decode_by, cache, communicator, device, engine.profiler, **how), sampler


def best(run: Callable[[], object], device: torch.device, *, rounds: int) -> float:
    found = math.inf
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        found = min(found, time.perf_counter() - start)
    return found


def step_seconds(steps: Steps, sampler: Sampler, device: torch.device, count: int) -> float:
    """One step of 8 rows, behind a short prompt."""
    member = steps.decoder(ROWS, slice(0, ROWS))

    def turns() -> None:
        member.begin_turns(sampler.best, [1] * ROWS, [SHORT] * ROWS)
        for _ in range(count):
            member.turn()

    turns()
    return best(turns, device, rounds=3) / count


def chunk_seconds(steps: Steps, parts: Any, rank: int, ends: Sequence[int], device: torch.device) -> list[float]:
    """Each chunk of one prompt, behind those before it; the second time, when everything is prepared."""
    stage = parts.entry("prefill", rank).stage
    found = [math.inf] * len(ends)
    for _ in range(2):
        steps.cache.start()
        for number, (start, end) in enumerate(pairwise([0, *ends])):
            piece = Piece([[5] * (end - start)], [start], (True,), (end == ends[-1],))
            received = [
                torch.rand(shape_of(crossing, steps.sizes(piece), parts.mesh, rank), device=device).to(crossing.dtype)
                for crossing in (() if stage is None else stage.receives)
            ]

            def run(piece: Piece = piece, received: Sequence[torch.Tensor] = received) -> None:
                steps.execute(piece, received)

            found[number] = min(found[number], best(run, device, rounds=1))
    return found


def decode(given: argparse.Namespace, model: Any, weights: DrawnWeights, device: torch.device) -> None:
    how = {"compile": given.compile, "cuda_graph": device.type == "cuda"} if device.type == "cuda" else {}
    room, count = {"rows": ROWS, "length": 256, "step": 1}, 2 if given.small else 64
    whole, plan = partition(model, Plan()), partition(model, Plan(pp=given.pp))
    alone = step_seconds(*steps_of(whole, 0, weights, device, **room, **how), device, count)
    stages = [step_seconds(*steps_of(plan, k, weights, device, **room, **how), device, count) for k in range(given.pp)]
    print(
        f"  decode: one GPU {alone * 1e3:.3f} ms, stages {', '.join(f'{s * 1e3:.3f}' for s in stages)} ms", flush=True
    )
    print(
        f"  mean over slowest {sum(stages) / len(stages) / max(stages):.3f}, sum over one GPU {sum(stages) / alone:.3f}"
    )
    transfer = given.transfer * 1e-6
    for groups in (given.pp, given.pp + 1):
        long = [time_of(relay(given.pp, groups, n), [[s] for s in stages], transfer=transfer).stop for n in (60, 120)]
        print(f"  {groups} groups of {ROWS}: {alone * 60 / (long[1] - long[0]):.3f} of one GPU with {ROWS} rows")


def prompt(given: argparse.Namespace, model: Any, weights: DrawnWeights, device: torch.device, tokens: int) -> None:
    whole, plan = partition(model, Plan()), partition(model, Plan.parse(f"pp={given.pp},pipeline.balance=prefill"))
    stage = plan.entry("prefill", 0).stage
    assert stage is not None
    room = {"rows": 1, "length": tokens, "step": tokens}
    ends = chunk_ends(
        tokens, stages=given.pp, longest=DEFAULT_STEP, pairs_per_token=stage.pairs_per_token, device=device.type
    )
    steps, _ = steps_of(whole, 0, weights, device, **room)
    one = {"one piece": [tokens], "default": [*range(DEFAULT_STEP, tokens, DEFAULT_STEP), tokens]}
    times = {name: sum(chunk_seconds(steps, whole, 0, ends, device)) for name, ends in one.items()}
    print(
        f"  {tokens} tokens, one GPU: {', '.join(f'{name} {s * 1e3:.0f} ms' for name, s in times.items())}", flush=True
    )
    del steps
    held = [steps_of(plan, k, weights, device, **room)[0] for k in range(given.pp)]
    seconds = [chunk_seconds(each, plan, k, ends, device) for k, each in enumerate(held)]
    stop = time_of(chain(given.pp, len(ends)), seconds, transfer=given.transfer * 1e-6).stop
    sums = [sum(each) for each in seconds]
    sizes = [end - start for start, end in pairwise([0, *ends])]
    each = " ".join(f"{size}:{s * 1e3:.0f}" for size, s in zip(sizes, seconds[0], strict=True))
    print(
        f"  {len(ends)} chunks: stages {', '.join(f'{s * 1e3:.0f}' for s in sums)} ms; first token "
        f"{stop * 1e3:.0f} ms, one GPU at its best {min(times.values()) / stop:.3f} times that\n"
        f"    tokens and ms of each on the first stage: {each}",
        flush=True,
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--only", choices=("decode", "prompt"))
    parser.add_argument("--compile", action="store_true", help="decode steps compiled as well as captured")
    parser.add_argument("--transfer", type=float, default=15.0, help="microseconds")
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--tokens", type=int, help="of the prompt; 65536, and 256 with --small")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, which say nothing of speed")
    given = parser.parse_args()
    device = torch.device(given.device)
    shape, tokens = ("small", given.tokens or 256) if given.small else ("8b", given.tokens or 65536)
    model = decoder(shape, layers=given.layers, positions=tokens + 2 * SHORT, device=device)
    weights = DrawnWeights(model, device)
    print(f"{device_name(device)}, shape {shape}, {model.config.num_hidden_layers} layers, pp={given.pp}", flush=True)
    if given.only != "prompt":
        decode(given, model, weights, device)
    if given.only != "decode":
        prompt(given, model, weights, device, tokens)


if __name__ == "__main__":
    main()
