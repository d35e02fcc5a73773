"""One decoded token of a Llama-3-8B shape on a GPU whose weights are held as stored, against bfloat16.

    bf16     8 billion weights of two bytes
    fp8      blocks of 128 x 128 with a scale
    awq      four bits, groups of 128 with a scale and a zero

The embedding's table and the last projection are bfloat16 in all of them. Made-up checkpoints, in a temporary folder,
are partitioned with Plan(weights="stored"); steps are captured. Time per token as in `benchmarks.gpu.decode`.

    python -m benchmarks.gpu.stored                  about three minutes, most of it making checkpoints
    python -m benchmarks.gpu.stored --layers 4
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers

from benchmarks.compiling.quantized_loading import make_checkpoint
from benchmarks.gpu.decode import build
from benchmarks.support.single_tokens import LENGTHS, ROUNDS, measured_speed, prompts, seconds
from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine

VOCABULARY = 128256


def stored(form: str, layers: int) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), form, layers, VOCABULARY)
        return engine(partition(folder, Plan(weights="stored")))


def engine(parts: object) -> Engine:
    alone = ThreadGroup(Mesh.of()).communicator(0)
    found: Engine = parts.engine(0, alone, device="cuda", compile=True, cuda_graph=True)  # type: ignore[attr-defined]
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--formats", nargs="+", choices=["fp8", "awq", "gptq"], default=["fp8", "awq"])
    parser.add_argument("--batch", type=int, default=1)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    ids = prompts(given.batch)
    times: dict[str, list[float]] = {}
    engines: dict[str, Engine] = {}
    for form in ("bf16", *given.formats):
        start = time.perf_counter()
        engines[form] = engine(partition(build(given.layers), Plan())) if form == "bf16" else stored(form, given.layers)
        engines[form].generate(ids, max_new_tokens=LENGTHS.many, eos_token_id=[])
        times[form] = []
        held = torch.cuda.memory_allocated() / 1e9
        print(f"warm: {form} ({time.perf_counter() - start:.0f} s, {held:.1f} GB in all)", flush=True)
    for _ in range(ROUNDS):
        for form, one in engines.items():
            many, few = (
                seconds(lambda n, e=one: e.generate(ids, max_new_tokens=n, eos_token_id=[]), n)
                for n in (LENGTHS.many, LENGTHS.few)
            )
            times[form].append((many - few) / (LENGTHS.many - LENGTHS.few))
    print(
        f"{torch.cuda.get_device_name()}, {given.layers} layers, batch {given.batch}, "
        f"measured {measured_speed() / 1e12:.2f} TB/s"
    )
    for form, of_one in times.items():
        print(f"{form:6} {min(of_one) * 1e3:6.3f} ms/token = {min(of_one) / min(times['bf16']):.2f} of bf16")


if __name__ == "__main__":
    main()
