"""One rank of `partitioner bench plan`: the launcher starts this per rank, and gives it the case."""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from partitioner.cli.actions.bench_plan import predicted
from partitioner.cli.jobs.bench_plan import PlanCase
from partitioner.compile.partition import partition
from partitioner.planning.cluster import Device, Dimension
from partitioner.planning.kernels import Kernels
from partitioner.planning.machine.calibrate import calibrate, link_of
from partitioner.planning.machine.host import Host
from partitioner.planning.summary import summarize_program
from partitioner.program.plan import Plan
from partitioner.sharding.mesh import Mesh
from partitioner.storage.dtypes import dtype_named
from partitioner.storage.example import EXAMPLE_MODEL
from partitioner.storage.named_model import load_config, load_model
from runtime.communication.process_groups import ProcessGroups
from runtime.engine.engine import Engine
from runtime.processes.launch import begin_worker, read_given, told_to_launch, write_answer

_TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
         "intermediate_size": 64, "vocab_size": 64}  # fmt: skip
"""Sizes of the model that comes along at which its kernels have no work, so that a step of it is the host's."""
_FEW, _MORE = 2, 6


def main() -> None:
    begin_worker()
    case = PlanCase.from_json(read_given().decode())
    here, host = None, Host()
    if case.gpus is None:
        here, host = _calibrated(case.plan.mesh.world_size), _host(case)
    dtype = "float32" if case.placed.type == "cpu" else "bfloat16"
    model = load_model(case.model, dtype=dtype_named(dtype))
    parts = partition(model, case.plan)
    assert parts.traced is not None
    ttft_s, tpot_s = _run(parts, case, int(model.config.get_text_config().vocab_size))
    first, between = predicted(summarize_program(parts.traced), case, host, here)
    by = f"by the tables of {case.gpus}" if here is None else _said(here, host)
    write_answer(json.dumps({
        "measured": {"ttft_s": ttft_s, "tpot_s": tpot_s}, "predicted": {"ttft_s": first, "tpot_s": between}, "by": by,
    }).encode())  # fmt: skip


def _calibrated(ranks: int) -> tuple[Kernels, Dimension, Device]:
    """On all ranks at the same time; numbers are those of the rank that takes longest."""
    if ranks == 1:
        kernels, machine = calibrate(lambda seconds: seconds)
        return kernels, Dimension("one rank", 1, machine.bytes_per_s, 0.0), machine
    communicator = ProcessGroups.connect(Mesh.of(tp=ranks), axes={("tp",)}, device="cpu", timeout_s=300)
    channel = communicator.channel("tp", node="calibration")

    def longest(seconds: float) -> float:
        return float(channel.all_gather(torch.tensor([seconds], dtype=torch.float64), 0).max())

    kernels, machine = calibrate(longest)
    link = link_of(channel, longest)
    communicator.close()
    return kernels, link, machine


def _host(case: PlanCase) -> Host:
    """From two models without work: what their layers differ in, and what is left."""
    example = load_config(str(EXAMPLE_MODEL))
    found = []
    for layers in (_FEW, _MORE):
        config = type(example)(**{**example.to_dict(), **_TINY, "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        parts = partition(model, Plan(dp=case.plan.mesh.world_size))
        assert parts.traced is not None
        found.append((_run(parts, case, _TINY["vocab_size"])[1], summarize_program(parts.traced).num_ops))
    return Host.of(*found)


def _run(parts: Any, case: PlanCase, vocabulary: int) -> tuple[float, float]:
    """Seconds to the first token, and between two: of each the fastest round."""
    ids = torch.randint(3, vocabulary, (case.batch, case.prompt), generator=torch.Generator().manual_seed(1))
    with Engine.connect(parts, device=case.placed, timeout_s=300) as engine:

        def seconds(count: int) -> float:
            start = time.perf_counter()
            engine.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
            return time.perf_counter() - start

        seconds(case.new)  # warms up
        rounds = [(seconds(1), seconds(case.new)) for _ in range(case.rounds)]
    return min(first for first, _ in rounds), min(last - first for first, last in rounds) / (case.new - 1)


def _said(here: tuple[Kernels, Dimension, Device], host: Host) -> str:
    kernels, link, _ = here
    return (
        f"by what was measured here: {kernels.bytes_per_s / 1e9:.1f} GB/s and "
        f"{kernels.flops_per_s['float32'] / 1e9:.0f} GFLOP/s a rank, messages of {link.latency_s * 1e6:.0f} us and "
        f"{link.bytes_per_s / 1e9:.2f} GB/s, {host.step_s * 1e3:.2f} ms of the host a step and "
        f"{host.op_s * 1e6:.1f} us an op"
    )


if __name__ == "__main__":
    with told_to_launch():
        main()
