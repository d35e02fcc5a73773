"""What steps of many requests take, on ranks of one host: of single tokens, with a prompt among them, and on the host.

tokens    rows that are told one token each: milliseconds between two tokens of a row, and tokens of all per second.
          Beside them, what the device takes when the same captured step runs again and again: less than a step where
          the host's work is not hidden behind the next one; over stages, it is that of a group of rows on one stage
prompt    the step in which a prompt of so many tokens is run amid rows, captured once it has come twice. "begun": until
          all of it is launched
load      as many rows, each of which asks anew when it is answered: prompts of 5 to 505 tokens, answers of 100 to 300.
          New tokens per second, with all that prompts take
long      a prompt of 8,192 tokens amid 16 rows by so many tokens a step: the longest step, and all of them together,
          over what they are by budgets of which one takes all

python -m benchmarks.serving.steps --ranks 2
python -m benchmarks.serving.steps --ranks 2 --plan pp=2
python -m benchmarks.serving.steps --ranks 2 --device cpu --small
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace

import torch
from torch import distributed as dist

from benchmarks.support.decoders import DrawnWeights, decoder
from benchmarks.support.several import device_name, device_of_rank, options, sharing, start, synchronize
from partitioner import CacheSize, Plan, partition
from runtime.engine.engine import Engine
from runtime.execution.threads import use_threads_for
from runtime.generation.batching.batch_loop import BatchLoop
from runtime.generation.batching.chosen_steps import Device, OwnDevice
from runtime.generation.batching.stages.chosen_groups import GroupDevice
from runtime.generation.decode_graphs.decoder import Decoder
from runtime.generation.generation_request import GenerationRequest

FEW, MANY, NEW = 16, 64, 1500


class Steps:
    """A loop on this rank; all ranks do the same."""

    def __init__(self, loop: BatchLoop, device: torch.device, words: int) -> None:
        self.loop, self._device, self._words = loop, device, words
        self._chance, self._next = random.Random(0), 0

    def add(self, length: int, new: int) -> int:
        ids = [self._chance.randrange(self._words) for _ in range(length)]
        request = GenerationRequest.of([ids], None, {"max_new_tokens": new, "do_sample": False}, eos_token_id=())
        self._next += 1
        self.loop.add(self._next, request)
        return self._next

    def step(self) -> float:
        """Milliseconds."""
        synchronize(self._device)
        began = time.perf_counter()
        self.loop.step()
        self.loop.status()
        synchronize(self._device)
        return 1e3 * (time.perf_counter() - began)

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    def until_all_run(self) -> None:
        """By single tokens."""
        while self.loop.status()["waiting"]:
            self.step()
        self.steps(12)

    def until_first(self, number: int) -> list[float]:
        """Of the steps until a sequence has been told its only token."""
        found = []
        while number in self.loop._asked:
            found.append(self.step())
        return found


def worker(given: argparse.Namespace) -> None:
    device = device_of_rank(given)
    model = decoder("small" if given.small else "8b", layers=given.layers, positions=16384, device=device)
    long, most = (256, 4096) if given.small else (8192, 160000)
    captured = device.type == "cuda"
    plan = Plan.parse(given.plan) if given.plan else Plan(tp=given.ranks)
    engine = Engine.connect(
        partition(model, plan), DrawnWeights(model, device), device=given.device, timeout_s=300,
        shared_memory=sharing(device), cuda_graph=captured,
    )  # fmt: skip
    with engine, torch.no_grad():
        use_threads_for(engine.program, MANY, device)

        def say(text: str) -> None:
            if dist.get_rank() == 0:
                print(text, flush=True)

        size = CacheSize(max_batch=1, max_length=most)
        loop = engine.batching(size, rows=MANY)
        for kind in (OwnDevice, GroupDevice):
            kind.begin_size = timed(kind.begin_size, say)  # type: ignore[method-assign, assignment]
        began = time.perf_counter()
        loop.reserve(size)
        say(f"  ready for all numbers of rows in {time.perf_counter() - began:.2f} s")
        run = Steps(loop, device, int(model.config.vocab_size))
        begun, launch = [0.0], BatchLoop.run

        def launched(*args: object) -> object:
            began = time.perf_counter()
            made = launch(*args)  # type: ignore[arg-type]
            begun[0] = 1e3 * (time.perf_counter() - began)
            return made

        BatchLoop.run = launched  # type: ignore[method-assign, assignment]

        new = 300 if given.small else NEW
        run.add(4, 2)
        run.steps(3)
        say(f"{given.ranks} x {device_name(device)}, {plan}, budget {loop_budget(run)}")
        for _ in range(FEW):
            run.add(20 if given.small else 128, new)
        run.until_all_run()
        tokens(run, FEW, captured, say, device)
        pieces(run, long, [32, 16] if given.small else given.pieces, say)
        for _ in range(MANY - 1 - FEW):
            run.add(5 + run._chance.randrange(20 if given.small else 500), new)
        run.until_all_run()
        tokens(run, MANY - 1, captured, say, device)
        for length in (16, 64, 161, 512, 1024):
            if length < long:
                found = []
                for _ in range(5):
                    (took,) = run.until_first(run.add(length, 1))[-1:]
                    found.append((took, begun[0]))
                    run.steps(1)
                took, launched = (statistics.median(each) for each in zip(*found[2:], strict=True))
                say(f"  prompt of {length} amid {MANY - 1} rows: {took:.2f} ms, begun in {launched:.2f}")
        load(run, 2000 if given.small else 30000, 20 if given.small else 500, say)
        loop.release()


def load(run: Steps, count: int, longest: int, say) -> None:  # type: ignore[no-untyped-def]
    """count: of new tokens, of which the first half is not measured."""
    for number in list(run.loop._asked):
        run.loop.cancel(number)
    run.steps(8)

    def ask() -> None:
        run.add(5 + run._chance.randrange(longest), 100 + run._chance.randrange(200))

    for _ in range(MANY - 1):
        ask()
    told, ended, began, half = 0, 0, time.perf_counter(), 0
    while told < count:
        if not half and told >= count // 2:
            began, half, ended = time.perf_counter(), told, 0
        for each in run.loop.step():
            told += 1
            if each.is_over:
                ended += 1
                ask()
    took = time.perf_counter() - began
    say(f"  load: {(told - half) / took:.0f} tokens a second, {ended / took:.1f} prompts a second among them")


def timed(begin_size, say):  # type: ignore[no-untyped-def]
    def begin(device: Device, rows: int) -> None:
        began = time.perf_counter()
        begin_size(device, rows)
        say(f"  steps of {rows} rows captured in {time.perf_counter() - began:.2f} s")

    return begin


def loop_budget(run: Steps) -> str:
    run.add(4, 1)
    run.steps(2)
    limits = run.loop.scheduler.limits  # type: ignore[union-attr]
    return f"{limits.budget}, {limits.beside} beside others"


def tokens(run: Steps, rows: int, captured: bool, say, device: torch.device) -> None:  # type: ignore[no-untyped-def]
    found = []
    for _ in range(3):
        run.loop.step()
        synchronize(device)
        began, told = time.perf_counter(), 0
        while told < 20 * rows:
            told += len(run.loop.step())
            run.loop.status()
        found.append((time.perf_counter() - began) / told)
    each = statistics.median(found)
    line = f"  tokens of {rows} rows: {1e3 * rows * each:.2f} ms each, {1 / each:.0f} a second"
    if captured:
        held = min((each for each in decoders(run.loop) if each.batch >= rows), key=lambda each: each.batch)
        graph = next(iter(held._graphs.values()))[0]
        times = []
        for _ in range(5):
            synchronize(device)
            dist.barrier()
            began = time.perf_counter()
            for _ in range(10):
                graph.replay()
            synchronize(device)
            times.append(100 * (time.perf_counter() - began))
        alone = statistics.median(times)
        line += f"; the device alone {alone:.2f}"
    say(line)


def decoders(loop: BatchLoop) -> list[Decoder]:
    return list(loop._steps._decoders.values())


def pieces(run: Steps, long: int, counts: list[int], say) -> None:  # type: ignore[no-untyped-def]
    scheduler = run.loop.scheduler
    limits = scheduler.limits  # type: ignore[union-attr]
    whole = None
    for count in counts:
        scheduler.limits = replace(limits, budget=max(count, limits.budget), beside=count)  # type: ignore[union-attr]
        found = [run.until_first(run.add(long, 1)) for _ in range(3)][1:]
        all_ms, longest = (statistics.median(map(of, found)) for of in (sum, max))
        whole = whole or all_ms
        say(f"  long, {count} a step: longest {longest:.1f} ms, all {all_ms:.1f}: {all_ms / whole:.2f}")
    scheduler.limits = limits  # type: ignore[union-attr]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--plan", help="by default tp= as many as ranks")
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--pieces", type=int, nargs="*", default=[8192, 2048, 512], help="long: tokens of a step")
    given = parser.parse_args()
    start("benchmarks.serving.steps", given, parts=("steps",), rank=worker)


if __name__ == "__main__":
    main()
