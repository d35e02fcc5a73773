"""A prompt of a Llama-3-8B shape in bfloat16, to its first token: on one GPU or several, with the defaults.

    ours                 in as few pieces as the device has room for, and in pieces of 512
    transformers         one GPU: generate of one token
    products             of the prompt, over the time, against a large matrix product of this run

On several GPUs (`--ranks`) tensor parallelism, and on each GPU all of the model besides; the slowest rank counts.

    python -m benchmarks.gpu.prefill                  one GPU, a minute
    python -m benchmarks.gpu.prefill --ranks 2
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers

from benchmarks.gpu.decode import build
from benchmarks.support.several import DeviceTurns
from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.processes.launch import begin_worker, launch

LENGTHS, ROUNDS, WIDTH, VOCABULARY = (4096, 16384), 5, 4096, 128256


def product_rate() -> float:
    """Operations per second of a product of random numbers."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    x @ x
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        x @ x
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start)


@torch.no_grad()
def rank(given: argparse.Namespace) -> None:
    number = int(os.environ.get("RANK", "0"))
    torch.cuda.set_device(number)
    model = build(given.layers)
    one = partition(model, Plan()).engine(0, ThreadGroup(Mesh.of()).communicator(0), device="cuda")
    split = Engine.connect(partition(model, Plan(tp=given.ranks)), device="cuda") if given.ranks > 1 else None
    parameters = sum(p.numel() for p in model.parameters()) - 2 * VOCABULARY * WIDTH
    rate, turns = product_rate(), DeviceTurns(torch.device("cuda", number))
    if number == 0:
        print(
            f"{given.ranks} x {torch.cuda.get_device_name()}, {given.layers} layers; products {rate / 1e12:.0f} TFLOP/s"
        )
    for length in LENGTHS:
        ids = torch.randint(0, VOCABULARY, (1, length), device="cuda", generator=torch.Generator("cuda").manual_seed(0))

        def ours(engine: Engine, ids: Any = ids, **options: int) -> Callable[[], object]:
            return lambda: engine.generate(ids, max_new_tokens=1, eos_token_id=[], **options)

        def theirs(ids: Any = ids) -> object:
            return model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)

        contestants: dict[str, tuple[int, Callable[[], object]]] = {
            "ours, 1 GPU": (1, ours(one)),
            "ours, 1 GPU, in pieces of 512": (1, ours(one, prefill_step=512)),
            "transformers, 1 GPU": (1, theirs),
        }
        if split is not None:
            contestants[f"ours, {given.ranks} GPUs"] = (given.ranks, ours(split))
        times = turns.medians({name: generate for name, (_, generate) in contestants.items()}, rounds=ROUNDS)
        flops = 2 * parameters * length + 2 * given.layers * length**2 * WIDTH
        alone = times["ours, 1 GPU"]
        for name, (gpus, _) in contestants.items():
            took = times[name]
            if number == 0:
                print(
                    f"{length:6} tokens  {name:30} {took * 1e3:7.1f} ms  1 GPU / this {alone / took:5.2f}  "
                    f"{flops / took / gpus / 1e12:4.0f} TFLOP/s a GPU = {flops / took / gpus / rate:4.0%} of a product"
                )
    if split is not None:
        split.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="A prompt on GPUs.")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=1)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    if given.ranks > 1 and "RANK" not in os.environ:
        options = [f"--{name}={value}" for name, value in vars(given).items()]
        launch(["benchmarks.gpu.prefill", *options], num_ranks=given.ranks, timeout_s=600)
        return
    if given.ranks > 1:
        begin_worker()
    rank(given)


if __name__ == "__main__":
    main()
