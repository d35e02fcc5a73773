"""A prompt of a Llama-3-8B shape in bfloat16, to its first token: on one GPU or several, with the defaults.

    ours                 in as few pieces as the device has room for, and in pieces of 512
    transformers         generate of one token: on one GPU, and on several by its tp_plan="auto"
    products             of the prompt, over the time, against a large matrix product of this run

On several GPUs (`--ranks`) tensor parallelism, with the defaults, in whole pieces, and in halves in turn, and on each
GPU all of the model besides; the slowest rank counts, of the rounds the median. A prompt comes again and again here, so
its pieces are replayed where they are captured; "node by node" is without that. What the first calls of
a length take, of the defaults, is printed where the longest one has been run before.

    python -m benchmarks.gpu.prefill                  one GPU, a minute
    python -m benchmarks.gpu.prefill --ranks 2 --lengths 4096 --without transformers pieces
    python -m benchmarks.gpu.prefill --ranks 2 --device cpu --small --rounds 1
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once

import torch
import transformers
from torch import distributed as dist
from transformers import LlamaForCausalLM

from benchmarks.gpu.pipeline import alone
from benchmarks.support.decoders import SHAPES, DrawnWeights, decoder
from benchmarks.support.peers import tp_plan_auto
from benchmarks.support.several import DeviceTurns, device_name, device_of_rank, options, sharing, start, synchronize
from partitioner import Plan, partition
from runtime.engine import Engine
from runtime.generation import steps

LENGTHS, SMALL_LENGTHS = (4096, 16384), (64, 129)
ALONE, BOTH, TURNS, WHOLE = "ours, 1 GPU", "ours, defaults", "ours, halves in turn", "ours, whole pieces"
NODES = "node by node"
NEVER = 1 << 60


def product_rate(device: torch.device) -> float:
    """Operations per second of a product of random numbers."""
    size = 8192 if device.type == "cuda" else 512
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    x @ x
    synchronize(device)
    began = time.perf_counter()
    for _ in range(10):
        x @ x
    synchronize(device)
    return 10 * 2 * size**3 / (time.perf_counter() - began)


def as_transformers_has_it(model: Any, weights: DrawnWeights, device: torch.device) -> Any:
    """The model with the same weights, all of them on this device."""
    with torch.device(device):
        held = type(model)._from_config(model.config, dtype=model.dtype).eval()
    for name, parameter in held.named_parameters():
        parameter.data.copy_(weights(name, tuple((0, size) for size in parameter.shape)))
    return held


def by_tp_plan(held: Any) -> tuple[Any, str]:
    """Transformers' own tensor parallelism over these ranks, or why there is none."""
    folders: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    if dist.get_rank() == 0:
        held.save_pretrained(folder)
    dist.barrier()
    try:
        model = tp_plan_auto(folder)
        if model is not None:  # fewer heads than ranks are refused by a shape that does not fit
            model.generate(torch.ones(1, 2, dtype=torch.int64, device=held.device), max_new_tokens=1, pad_token_id=0)
        return model, "" if model is not None else "it needs accelerate"
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


@torch.no_grad()
def rank(given: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = device_of_rank(given) if "RANK" in os.environ else torch.device(given.device)
    shape, lengths = ("small", SMALL_LENGTHS) if given.small else ("8b", tuple(given.lengths))
    model = decoder(shape, layers=given.layers, positions=max(lengths) + 8, device=device)
    weights = DrawnWeights(model, device)
    one = alone(partition(model, Plan()), weights, device)
    held = None if "transformers" in given.left_out else as_transformers_has_it(model, weights, device)
    split, auto, why = None, None, ""
    if given.ranks > 1:
        parts = partition(model, Plan(tp=given.ranks))
        split = Engine.connect(parts, weights, device=device.type, shared_memory=sharing(device))
        if held is not None:
            auto, why = by_tp_plan(held)
    first = split is None or split.program.rank == 0
    rate, turns = product_rate(device), DeviceTurns(device)
    if first:
        print(
            f"{given.ranks} x {device_name(device)}, shape {shape}, {model.config.num_hidden_layers} layers; products "
            f"{rate / 1e12:.2f} TFLOP/s{f'; left out: tp_plan: {why}' if why else ''}"
        )
    told = split or one
    told.generate(torch.ones(1, max(lengths), dtype=torch.int64), max_new_tokens=1)  # the cache is that of the longest
    for length in lengths:
        if length < max(lengths):
            calls = first_calls(told, length, turns)
            if first:
                print(f"{length:6} tokens  ours, defaults, calls one after the other, ms: {calls}", flush=True)
        report(given, length, measured(given, length, one, split, held, auto, turns, model), rate, model, first=first)
    if split is not None:
        split.close()


@contextmanager
def toggled(turns_from: int | None, *, captured: bool) -> Iterator[None]:
    """Halves of pieces take turns from so many tokens on; what comes again is replayed or not."""
    before = steps.TURNS_FROM, steps.CAPTURED_ON
    steps.TURNS_FROM, steps.CAPTURED_ON = turns_from, before[1] if captured else frozenset()
    try:
        yield
    finally:
        steps.TURNS_FROM, steps.CAPTURED_ON = before


def measured(
    given: argparse.Namespace, length: int, one: Engine, split: Engine | None, held: Any, auto: Any,
    turns: DeviceTurns, model: Any,
) -> dict[str, tuple[int, float]]:  # fmt: skip
    """By contestant: how many GPUs it has, and its seconds."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(turns.device)

    def ours(
        engine: Engine, *, turns_from: int | None = None, captured: bool = True, **made: int
    ) -> Callable[[], object]:
        def generate() -> object:
            with toggled(turns_from, captured=captured):
                return engine.generate(ids, max_new_tokens=1, eos_token_id=[], **made)

        return generate

    def theirs(model: LlamaForCausalLM) -> Callable[[], object]:
        return lambda: model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)

    piece = 16 if given.small else 512
    contestants: dict[str, tuple[int, Callable[[], object]]] = {ALONE: (1, ours(one))}
    if "pieces" not in given.left_out:
        of_pieces = f"{ALONE}, in pieces of {piece}"
        contestants[of_pieces] = 1, ours(one, prefill_step=piece)
        contestants[f"{of_pieces}, {NODES}"] = 1, ours(one, captured=False, prefill_step=piece)
    if held is not None:
        contestants["transformers, 1 GPU"] = (1, theirs(held))
    if split is not None:
        ways = {
            BOTH: ours(split), f"{BOTH}, {NODES}": ours(split, captured=False),
            f"{TURNS}, {NODES}": ours(split, turns_from=2, captured=False),
            f"{WHOLE}, {NODES}": ours(split, turns_from=NEVER, captured=False),
        }  # fmt: skip
        contestants |= {name: (given.ranks, run) for name, run in ways.items()}
    if auto is not None:
        contestants['transformers, tp_plan="auto"'] = (given.ranks, theirs(auto))
    times = turns.medians({name: run for name, (_, run) in contestants.items()}, rounds=given.rounds, before=3)
    return {name: (gpus, times[name]) for name, (gpus, _) in contestants.items()}


def first_calls(engine: Engine, length: int, turns: DeviceTurns) -> str:
    """What the first prompts of a length take, another one each; the last is a few tokens shorter."""
    taken = []
    for number, size in enumerate([length] * 4 + [length - 3]):
        drawn = torch.randint(0, 200, (1, size), generator=torch.Generator().manual_seed(number))
        turns.meet()
        began = time.perf_counter()
        engine.generate(drawn, max_new_tokens=1, eos_token_id=[])
        synchronize(turns.device)
        taken.append(time.perf_counter() - began)
    return ", ".join(f"{seconds * 1e3:.1f}" for seconds in turns.slowest(taken))


def report(
    given: argparse.Namespace, length: int, took: dict[str, tuple[int, float]], rate: float, model: Any, *, first: bool
) -> None:
    sizes = SHAPES["small" if given.small else "8b"]
    layers, width = model.config.num_hidden_layers, sizes["hidden_size"]
    inside = sum(p.numel() for p in model.parameters()) - 2 * sizes["vocab_size"] * width
    flops = 2 * inside * length + 2 * layers * length**2 * width
    for name, (gpus, seconds) in took.items() if first else ():
        print(
            f"{length:6} tokens  {name:56} {seconds * 1e3:8.1f} ms  1 GPU / this {took[ALONE][1] / seconds:5.2f}  "
            f"{flops / seconds / gpus / 1e12:6.2f} TFLOP/s a GPU = {flops / seconds / gpus / rate:4.0%} of a product",
            flush=True,
        )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of prompts, in tokens")
    parser.add_argument("--without", dest="left_out", nargs="*", choices=("pieces", "transformers"), default=[])
    parser.set_defaults(ranks=1)
    given = parser.parse_args()
    if given.ranks == 1:
        rank(given)
    else:
        start("benchmarks.gpu.prefill", given, parts=[f"tp={given.ranks}"], rank=rank)


if __name__ == "__main__":
    main()
