"""A prompt of a Llama-3-8B shape in bfloat16, to its first token: on one GPU or several, with the defaults.

    ours                 in as few pieces as the device has room for, and in pieces of 512
    transformers         generate of one token: on one GPU, and on several by its tp_plan="auto"
    products             of the prompt, over the time, against a large matrix product of this run

On several GPUs (`--ranks`) tensor parallelism, with the defaults, in whole pieces, and in halves in turn, and on each
GPU all of the model besides; the slowest rank counts, of the rounds the median.

`--with` switches on what is off by default, as it has not been measured yet; each beside what it takes the place of:

    rows        sums by rows in halves in turn, and in whole ones   an all-reduce, and norms of all rows everywhere
    captured    pieces that come again are replayed                 node by node
    merged      one product for all linears of one input            a run of the benchmark without

    python -m benchmarks.gpu.prefill                  one GPU, a minute
    python -m benchmarks.gpu.prefill --ranks 2 --with rows captured merged
    python -m benchmarks.gpu.prefill --ranks 2 --device cpu --small --rounds 1
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from runtime.communication.peer_memory import mapped_memory
from runtime.communication.peer_memory.rows import sum_rows
from runtime.engine import Engine, engine
from runtime.generation import steps

LENGTHS, SMALL_LENGTHS = (4096, 16384), (64, 129)
ALONE, BOTH, TURNS, WHOLE = "ours, 1 GPU", "ours, defaults", "ours, halves in turn", "ours, whole pieces"
NODES, NORMS = "node by node", "norms everywhere"
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
        return model, "" if model is not None else "it needs accelerate"
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


def switch_on(wanted: Sequence[str]) -> None:
    """What is off by default, before anything is made."""
    if "rows" in wanted:
        mapped_memory.ROW_SUMS = True
    if "captured" in wanted:
        steps.CAPTURED_ON = frozenset({"cuda"})
    if "merged" in wanted:
        engine.MERGED_ON = frozenset({"cuda"})


@torch.no_grad()
def rank(given: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    switch_on(given.switched_on)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = device_of_rank(given) if "RANK" in os.environ else torch.device(given.device)
    shape, lengths = ("small", SMALL_LENGTHS) if given.small else ("8b", LENGTHS)
    model = decoder(shape, layers=given.layers, positions=max(lengths) + 8, device=device)
    weights = DrawnWeights(model, device)
    one = alone(partition(model, Plan()), weights, device)
    held = as_transformers_has_it(model, weights, device)
    split, auto, why = None, None, ""
    if given.ranks > 1:
        parts = partition(model, Plan(tp=given.ranks))
        split = Engine.connect(parts, weights, device=device.type, shared_memory=sharing(device))
        auto, why = by_tp_plan(held)
    first = split is None or split.program.rank == 0
    rate, turns = product_rate(device), DeviceTurns(device)
    if first:
        print(
            f"{given.ranks} x {device_name(device)}, shape {shape}, {model.config.num_hidden_layers} layers; products "
            f"{rate / 1e12:.2f} TFLOP/s{f'; left out: tp_plan: {why}' if why else ''}"
        )
    for length in lengths:
        report(given, length, measured(given, length, one, split, held, auto, turns, model), rate, model, first=first)
    if split is not None:
        split.close()


@contextmanager
def toggled(turns_from: int | None, *, captured: bool, by_rows: bool, whole_by_rows: bool = False) -> Iterator[None]:
    """Halves of pieces take turns from so many tokens on; captures and sums by rows are on or off."""
    before = steps.TURNS_FROM, steps.CAPTURED_UP_TO, sum_rows.LEAST_BYTES
    steps.TURNS_FROM, steps.WHOLE_BY_ROWS = turns_from, whole_by_rows
    steps.CAPTURED_UP_TO, sum_rows.LEAST_BYTES = before[1] if captured else 0, before[2] if by_rows else NEVER
    try:
        yield
    finally:
        steps.TURNS_FROM, steps.CAPTURED_UP_TO, sum_rows.LEAST_BYTES = before
        steps.WHOLE_BY_ROWS = False


def measured(
    given: argparse.Namespace, length: int, one: Engine, split: Engine | None, held: Any, auto: Any,
    turns: DeviceTurns, model: Any,
) -> dict[str, tuple[int, float]]:  # fmt: skip
    """By contestant: how many GPUs it has, and its seconds."""
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(turns.device)

    def ours(
        engine: Engine, *, turns_from: int | None = None, captured: bool = True, by_rows: bool = True,
        whole_by_rows: bool = False, **made: int,
    ) -> Callable[[], object]:  # fmt: skip
        def generate() -> object:
            with toggled(turns_from, captured=captured, by_rows=by_rows, whole_by_rows=whole_by_rows):
                return engine.generate(ids, max_new_tokens=1, eos_token_id=[], **made)

        return generate

    def theirs(model: LlamaForCausalLM) -> Callable[[], object]:
        return lambda: model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)

    piece = 16 if given.small else 512
    contestants: dict[str, tuple[int, Callable[[], object]]] = {
        ALONE: (1, ours(one)),
        f"{ALONE}, in pieces of {piece}": (1, ours(one, prefill_step=piece)),
        "transformers, 1 GPU": (1, theirs(held)),
    }
    if split is not None:
        ways = {BOTH: ours(split), TURNS: ours(split, turns_from=2), WHOLE: ours(split, turns_from=NEVER)}
        contestants |= {name: (given.ranks, run) for name, run in ways.items()}
    if "captured" in given.switched_on:
        contestants[f"{ALONE}, in pieces of {piece}, {NODES}"] = (1, ours(one, captured=False, prefill_step=piece))
        if split is not None:
            contestants[f"{TURNS}, {NODES}"] = (given.ranks, ours(split, turns_from=2, captured=False))
            contestants[f"{WHOLE}, {NODES}"] = (given.ranks, ours(split, turns_from=NEVER, captured=False))
    if "rows" in given.switched_on and split is not None:
        contestants[f"{WHOLE}, by rows"] = (given.ranks, ours(split, turns_from=NEVER, whole_by_rows=True))
        # node by node, as a captured piece sums by rows for ever
        without = ours(split, turns_from=2, captured=False, by_rows=False)
        contestants[f"{TURNS}, {NODES}, {NORMS}"] = (given.ranks, without)
    if auto is not None:
        contestants['transformers, tp_plan="auto"'] = (given.ranks, theirs(auto))
    times = turns.medians({name: run for name, (_, run) in contestants.items()}, rounds=given.rounds, before=3)
    return {name: (gpus, times[name]) for name, (gpus, _) in contestants.items()}


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
    parser.add_argument("--with", dest="switched_on", nargs="*", choices=("rows", "captured", "merged"), default=[])
    parser.set_defaults(ranks=1)
    given = parser.parse_args()
    if given.ranks == 1:
        rank(given)
    else:
        start("benchmarks.gpu.prefill", given, parts=[f"tp={given.ranks}"], rank=rank)


if __name__ == "__main__":
    main()
