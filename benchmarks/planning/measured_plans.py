"""Plans on two processes of this machine: the predicted time of a token beside the measured one, and the choice by it.

    python -m benchmarks.planning.measured_plans [--rounds 5] [--prompt 64] [--new 12] [--batch 2]

calibration    anew before each case, both ranks at the same time, since they share the machine's memory: products of
               several sizes, attention of a token; all-reduces of two sizes between them (shared memory, as in the
               cases), alone and behind a product; and, for each model, what a step takes beside its kernels, from two
               models too small to have any work
measured       seconds between two tokens of greedy generation: (new tokens - first token) / (new - 1), of the rank that
               takes longest, the least of all rounds
predicted      `Pricer` over the calibrated tables, nothing fitted on the cases

Each model has random weights in float32 and one thread per rank. On a machine with other work, and with more ranks than
cores, times are those of ranks that wait for each other to be scheduled: the load is printed beside. --clock processor
counts what the busier rank has computed instead (of stages, what both have).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.distributed import TCPStore
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.support.ranks import launch_ranks
from partitioner import Plan, partition
from partitioner.planning.cluster import Device, Dimension
from partitioner.planning.kernels import Kernels
from partitioner.planning.machine.calibrate import calibrate, link_of
from partitioner.planning.machine.host import Host, pricer_here, times_of
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import summarize_program
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups, Sharing
from runtime.engine import Engine
from runtime.processes.launch import begin_worker

TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "llama": ("llama", {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12,
                        "num_key_value_heads": 12, "head_dim": 64, "intermediate_size": 2048}),
    "llama, wide": ("llama", {"hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
                              "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 6144}),
    "qwen3, deep": ("qwen3", {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
                              "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1536}),
    "mistral, large vocabulary": ("mistral", {"hidden_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
                                              "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 2048,
                                              "vocab_size": 32000}),
}  # fmt: skip
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
PLANS = ("tp=2", "pp=2", "dp=2")


def model_of(kind: str, fields: dict[str, int]) -> Any:
    torch.manual_seed(0)
    shape = {"vocab_size": 1024, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, **fields}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**shape), dtype=torch.float32).eval()


class Meeting:
    """Both ranks, beside the groups of the engines that come and go."""

    def __init__(self, store: TCPStore) -> None:
        self.rank = int(os.environ["RANK"])
        self._store, self._number = store, 0

    def most(self, seconds: float) -> float:
        return max(self.both(seconds))

    def both(self, seconds: float) -> list[float]:
        """Of both ranks; neither goes on before the other has come."""
        self._number += 1
        self._store.set(f"measured/{self._number}/{self.rank}", repr(seconds))
        return [float(self._store.get(f"measured/{self._number}/{rank}")) for rank in (0, 1)]


def calibrated(channel: Any, meeting: Meeting, clock: str) -> tuple[Kernels, Dimension, Device]:
    kernels, kind = calibrated_kernels(meeting, clock)
    return kernels, link_of(channel, meeting.most, CLOCKS[clock]), kind


def calibrated_kernels(meeting: Meeting, clock: str = "wall") -> tuple[Kernels, Device]:
    return calibrate(meeting.most, CLOCKS[clock])


class Case:
    """A model on a plan, ready to be run."""

    def __init__(
        self, model: Any, plan: str, workload: Workload, meeting: Meeting, clock: str, *, sharing: Sharing = "auto"
    ) -> None:
        self.plan, self.workload, self.meeting, self.clock = Plan.parse(plan), workload, meeting, clock
        parts = partition(model, self.plan)
        assert parts.traced is not None
        self.traced = parts.traced
        self.engine = Engine.connect(parts, timeout_s=300, shared_memory=sharing)
        vocabulary = int(model.config.vocab_size)
        self.ids = torch.randint(
            3, vocabulary, (workload.batch, workload.prompt), generator=torch.Generator().manual_seed(1)
        )

    def token_s(self) -> float:
        """Between two tokens."""
        new = self.workload.new
        return (self.write_s(new) - self.write_s(1)) / (new - 1)

    def write_s(self, count: int) -> float:
        """Until each row has so many tokens."""
        self.meeting.most(0)
        start = CLOCKS[self.clock]()
        self.engine.generate(self.ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        took = self.meeting.both(CLOCKS[self.clock]() - start)
        if self.clock == "processor" and self.plan.pp > 1:  # stages take turns: what both have done is one's time
            return sum(took) / min(self.plan.pp, self.workload.batch)
        return max(took)


def beside_kernels(workload: Workload, rounds: int, meeting: Meeting, clock: str, *, sharing: Sharing = "auto") -> Host:
    """Of steps whose kernels have no work."""
    found = []
    for layers in (2, 6):
        model = model_of("llama", {**TINY, "num_hidden_layers": layers})
        case = Case(model, "dp=2", workload, meeting, clock, sharing=sharing)
        case.token_s()
        found.append((min(case.token_s() for _ in range(rounds)), summarize_program(case.traced).num_ops))
        case.engine.close()
    return Host.of(*found)


def worker(workload: Workload, rounds: int, names: list[str], port: int, clock: str) -> None:
    begin_worker()
    meeting = Meeting(TCPStore("127.0.0.1", port, is_master=False))

    def say(text: str) -> None:
        if meeting.rank == 0:
            print(text, flush=True)

    def calibration() -> tuple[Kernels, Dimension, Device]:
        communicator = ProcessGroups.connect(Mesh.of(tp=2), axes={("tp",)}, device="cpu", timeout_s=300)
        found = calibrated(communicator.channel("tp", node="calibration"), meeting, clock)
        communicator.close()
        return found

    say(f"{'model':26} {'plan':6} {'predicted':>10} {'measured':>10} {'off':>6}")
    off, regrets = [], []
    for name in names:
        model = model_of(*MODELS[name])
        guessed: dict[str, float] = {}
        measured: dict[str, float] = {}
        beside = beside_kernels(workload, rounds, meeting, clock)
        for plan in PLANS:
            tables = calibration()
            case = Case(model, plan, workload, meeting, clock)
            case.token_s()  # warms up
            measured[plan] = min(case.token_s() for _ in range(rounds))
            case.engine.close()
            pricer = pricer_here(summarize_program(case.traced), *tables)
            guessed[plan] = times_of(pricer, case.plan, workload, beside)[1]
            off.append(abs(guessed[plan] / measured[plan] - 1))
            say(
                f"{name:26} {plan:6} {guessed[plan] * 1e3:7.2f} ms {measured[plan] * 1e3:7.2f} ms "
                f"{guessed[plan] / measured[plan] - 1:+6.0%}  {told(tables, beside)}"
            )
        first = min(guessed, key=lambda plan: guessed[plan])
        regrets.append(measured[first] / min(measured.values()) - 1)
        say(f"{'':26} first choice {first}, {regrets[-1]:.1%} slower than the best")
    within = sum(each <= 0.15 for each in off)
    slower = ", ".join(f"{each:.1%}" for each in regrets)
    say(f"within 15%: {within} of {len(off)} cases; the first choice is slower than the best by {slower}")


def told(tables: tuple[Kernels, Dimension, Device], host: Host) -> str:
    kernels, dimension, _ = tables
    return (
        f"{kernels.bytes_per_s / 1e9:.0f} GB/s, {kernels.flops_per_s['float32'] / 1e9:.0f} GFLOP/s; all-reduce "
        f"{dimension.latency_s * 1e6:.0f} us, {dimension.bytes_per_s / 1e9:.1f} GB/s; beside kernels "
        f"{host.step_s * 1e3:.2f} ms and {host.op_s * 1e6:.1f} us an op; load {os.getloadavg()[0]:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--models", default=json.dumps(list(MODELS)), help="a JSON list")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--port", type=int, default=0, help="of the ranks' meeting; chosen by the first process")
    given = parser.parse_args()
    if "RANK" in os.environ:
        worker(
            Workload(given.prompt, given.new, given.batch),
            given.rounds,
            json.loads(given.models),
            given.port,
            given.clock,
        )
    else:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        launch_ranks(
            ["benchmarks.planning.measured_plans", *sys.argv[1:], f"--port={store.port}"], num_ranks=2, timeout_s=3000
        )


if __name__ == "__main__":
    main()
