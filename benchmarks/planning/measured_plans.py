"""Plans on two processes of this machine: the predicted time of a token beside the measured one, and the choice by it.

    python -m benchmarks.planning.measured_plans [--rounds 5] [--prompt 64] [--new 12] [--batch 2]

calibration    in turn with the rounds of each case, both ranks at the same time, since they share the machine's memory:
               products of several sizes, attention of a token; all-reduces of two sizes between them (shared memory,
               as in the cases), alone and behind a product; and what a step takes beside its kernels, from two models
               too small to have any work
measured       seconds between two tokens of greedy generation: (new tokens - first token) / (new - 1), of the rank that
               takes longest
predicted      `Pricer` over the calibrated tables, nothing fitted on the cases

A machine is not as fast now as a minute ago, so that all of these are taken in the same minutes, and of each the median
of its rounds, or windows, counts.

Each model has random weights in float32 and one thread per rank. On a machine with other work, and with more ranks than
cores, times are those of ranks that wait for each other to be scheduled: the load is printed beside. --clock processor
counts what the busier rank has computed instead (of stages, what both have).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from partitioner.planning.machine.calibrate import Calibration, link_of
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


class Case:
    """A model on a plan. Of all cases of a process one at a time is connected."""

    def __init__(
        self, model: Any, plan: str, workload: Workload, meeting: Meeting, clock: str, *, sharing: Sharing = "auto"
    ) -> None:
        self.plan, self.workload, self.meeting, self.clock = Plan.parse(plan), workload, meeting, clock
        self._sharing: Sharing = sharing
        self._parts = partition(model, self.plan)
        assert self._parts.traced is not None
        self.summary = summarize_program(self._parts.traced)
        vocabulary = int(model.config.vocab_size)
        self.ids = torch.randint(
            3, vocabulary, (workload.batch, workload.prompt), generator=torch.Generator().manual_seed(1)
        )
        self._engine: Engine | None = None

    @contextmanager
    def connected(self) -> Iterator[None]:
        self._engine = Engine.connect(self._parts, timeout_s=300, shared_memory=self._sharing)
        try:
            self.write_s(2)  # warms up
            yield
        finally:
            self._engine.close()

    def token_s(self) -> float:
        """Between two tokens."""
        new = self.workload.new
        return (self.write_s(new) - self.write_s(1)) / (new - 1)

    def write_s(self, count: int) -> float:
        """Until each row has so many tokens."""
        assert self._engine is not None
        self.meeting.most(0)
        start = CLOCKS[self.clock]()
        self._engine.generate(self.ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        took = self.meeting.both(CLOCKS[self.clock]() - start)
        if self.clock == "processor" and self.plan.pp > 1:  # stages take turns: what both have done is one's time
            return sum(took) / min(self.plan.pp, self.workload.batch)
        return max(took)


class Beside:
    """Steps of two models whose kernels have no work: what a host takes beside them."""

    def __init__(self, workload: Workload, meeting: Meeting, clock: str, *, sharing: Sharing = "auto") -> None:
        self._cases = [
            Case(model_of("llama", {**TINY, "num_hidden_layers": layers}), "dp=2", workload, meeting, clock,
                 sharing=sharing)
            for layers in (2, 6)
        ]  # fmt: skip
        self._took: list[tuple[float, ...]] = []

    def measure(self, rounds: int = 2) -> None:
        took = []
        for case in self._cases:
            with case.connected():
                took.append([case.token_s() for _ in range(rounds)])
        self._took += zip(*took, strict=True)

    def forget(self) -> None:
        self._took.clear()

    def host(self) -> Host:
        seconds = (statistics.median(each) for each in zip(*self._took, strict=True))
        few, more = zip(seconds, (case.summary.num_ops for case in self._cases), strict=True)
        return Host.of(few, more)


def median_link(found: Sequence[Dimension]) -> Dimension:
    """Start and speed each by itself."""
    latencies, speeds = ([getattr(each, name) for each in found] for name in ("latency_s", "bytes_per_s"))
    return replace(found[0], latency_s=statistics.median(latencies), bytes_per_s=statistics.median(speeds))


def worker(workload: Workload, rounds: int, names: list[str], port: int, clock: str) -> None:
    begin_worker()
    meeting = Meeting(TCPStore("127.0.0.1", port, is_master=False))

    def say(text: str) -> None:
        if meeting.rank == 0:
            print(text, flush=True)

    def link() -> Dimension:
        communicator = ProcessGroups.connect(Mesh.of(tp=2), axes={("tp",)}, device="cpu", timeout_s=300)
        found = link_of(communicator.channel("tp", node="calibration"), meeting.most, CLOCKS[clock])
        communicator.close()
        return found

    beside = Beside(workload, meeting, clock)
    say(f"{'model':26} {'plan':6} {'predicted':>10} {'measured':>10} {'off':>6}")
    off, regrets = [], []
    for name in names:
        model = model_of(*MODELS[name])
        cases = {plan: Case(model, plan, workload, meeting, clock) for plan in PLANS}
        calibration = Calibration(meeting.most, CLOCKS[clock], of_windows=statistics.median)
        links: list[Dimension] = []
        times: dict[str, list[float]] = {plan: [] for plan in PLANS}
        beside.forget()
        for _ in range(rounds):
            calibration.measure(1)
            links.append(link())
            for plan, case in cases.items():
                with case.connected():
                    times[plan] += (case.token_s() for _ in range(2))
            beside.measure()
        kernels, kind = calibration.tables()
        tables, host = (kernels, median_link(links), kind), beside.host()
        say(f"{name}: {told(tables, host)}")
        guessed: dict[str, float] = {}
        measured: dict[str, float] = {}
        for plan, case in cases.items():
            pricer = pricer_here(case.summary, *tables)
            guessed[plan] = times_of(pricer, case.plan, workload, host)[1]
            measured[plan] = statistics.median(times[plan])
            off.append(abs(guessed[plan] / measured[plan] - 1))
            say(
                f"{name:26} {plan:6} {guessed[plan] * 1e3:7.2f} ms {measured[plan] * 1e3:7.2f} ms "
                f"{guessed[plan] / measured[plan] - 1:+6.0%}  of {min(times[plan]) * 1e3:.2f} to "
                f"{max(times[plan]) * 1e3:.2f} ms"
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
