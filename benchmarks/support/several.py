"""Ranks of one host with a device each: the options that benchmarks of several GPUs share, their start, their turns.

    given = options("what it measures").parse_args()
    start("benchmarks.gpu.x", given, parts=("pp=2", "tp=2"), rank=worker)    each part by ranks of its own, in order,
                                                                             which have it as given.part

`--device cpu --small` runs the same code over gloo between processes, with tiny shapes: what it prints is no speed of
anything, but that it runs. A part that fails is told, the parts behind it run all the same, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import distributed as dist

from benchmarks.support.ranks import launch_ranks
from benchmarks.support.rounds import Took, take_turns
from partitioner.errors import PartitionerError
from runtime.communication.process_groups import Sharing
from runtime.processes.launch import begin_worker

__all__ = ["DeviceTurns", "device_name", "device_of_rank", "options", "sharing", "start", "synchronize"]

Run = Callable[[], object]

_QUEUED_CYCLES = 10_000_000
"""For which a GPU waits, some 5 ms, while the host fills its queue."""


def options(description: str | None, *, rounds: int = 5) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="2, 4 or 8")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, which say nothing of speed")
    parser.add_argument("--timeout", type=float, default=580.0, help="seconds that a part may take")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser


def start(
    module: str,
    given: argparse.Namespace,
    *,
    parts: Sequence[str],
    rank: Callable[[argparse.Namespace], None],
    told: Callable[[dict[str, list[bytes]]], None] = lambda answers: None,
) -> None:
    """In the first process: ranks for each part; `told` is given what they answered, by part. In these: `rank`."""
    if "RANK" in os.environ:
        begin_worker()
        rank(given)
        return
    if given.device == "cuda" and torch.cuda.device_count() < given.ranks:
        sys.exit(
            f"--ranks {given.ranks} needs as many GPUs, and there are {torch.cuda.device_count()}: give fewer, or "
            "--device cpu --small, which runs the same code with tiny shapes"
        )
    answers = {}
    for part in parts:
        try:
            command = [module, *sys.argv[1:], f"--part={part}"]
            answers[part] = launch_ranks(command, num_ranks=given.ranks, timeout_s=given.timeout)
        except PartitionerError as error:
            print(f"left out: {part}: {error}", flush=True)
    told(answers)
    if len(answers) < len(parts):
        sys.exit(1)


def device_of_rank(given: argparse.Namespace) -> torch.device:
    if given.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def sharing(device: torch.device) -> Sharing:
    """GPUs write into each other's memory where that is quicker, and it is an error where they cannot."""
    return "on" if device.type == "cuda" else "auto"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DeviceTurns:
    """Contestants on all ranks take turns; of the rounds the median counts, of the ranks the slowest."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def meet(self) -> None:
        if dist.is_initialized():
            dist.barrier()
        synchronize(self.device)

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """Of all ranks, each place for itself."""
        found = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()  # type: ignore[no-any-return]

    def of_all(self, seconds: float) -> list[float]:
        """Of each rank, by rank."""
        mine = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine)
        return [float(each) for each in found]

    def medians(
        self, contestants: Mapping[str, Run], *, rounds: int, calls: int = 1, before: int = 1
    ) -> dict[str, float]:
        """Seconds of one call, by name; `calls` run behind each other before the device is waited for.

        before: rounds that do not count.
        """

        def through(run: Run) -> Run:
            def call() -> None:
                for _ in range(calls):
                    run()
                synchronize(self.device)

            return call

        ready = {name: through(run) for name, run in contestants.items()}
        take_turns(ready, rounds=before, meet=self.meet)
        times = take_turns(ready, rounds=rounds, meet=self.meet)
        return {name: statistics.median(self.slowest(of_one)) / calls for name, of_one in times.items()}

    def queued_medians(
        self, contestants: Mapping[str, Run], *, rounds: int, calls: int, rest_s: float
    ) -> dict[str, float]:
        """The same of calls that stand in the GPU's queue before the first of them begins, as those of a prompt's later
        layers do; on a CPU, as they come. rest_s: before each turn nothing runs for so long.
        """
        if self.device.type == "cpu":
            return self.medians(contestants, rounds=rounds, calls=calls)
        together = torch.zeros(1, device=self.device)

        def behind(run: Run) -> Run:
            def turn() -> Took:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                time.sleep(rest_s)
                torch.cuda._sleep(_QUEUED_CYCLES)
                if dist.is_initialized():
                    dist.all_reduce(together)  # the ranks' GPUs come together here
                start.record()
                for _ in range(calls):
                    run()
                end.record()
                end.synchronize()
                return Took(start.elapsed_time(end) / 1e3)

            return turn

        ready = {name: behind(run) for name, run in contestants.items()}
        take_turns(ready, rounds=1, meet=self.meet)
        times = take_turns(ready, rounds=rounds, meet=self.meet)
        return {name: statistics.median(self.slowest(of_one)) / calls for name, of_one in times.items()}
