"""Many requests at once over GPUs of one host, without HTTP: ours, and transformers' continuous batching.

    load    as many clients as `--clients`, each of which asks again when it is answered; lengths as of conversations.
            New tokens per second of `partitioner.launch` over those of transformers, both with tensor parallelism
    stall   ours alone: 16 rows are continued, and a prompt of 8,192 tokens comes. The 99th percentile of the time per
            token of the 16 (by answers, and by gaps between two tokens while the prompt runs), over what it is without;
            and the time to the prompt's first token, over what it is by itself

Both have drawn weights of one folder, which lies in memory, room for the same number of tokens, and processes of their
own, on the same GPUs at the same time; they are asked in turns. transformers' ranks are started by torchrun. A round
ends when `--requests` are answered or after `--seconds`; then tokens of answers that are not complete count as well. So
the slower side has read shorter texts, and the quicker one has had few rows at its end: both raise the slower one.

    python -m benchmarks.serving.on_gpus --ranks 2
    python -m benchmarks.serving.on_gpus --ranks 2 --device cpu --small --rounds 1
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import queue
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import torch
import transformers

from benchmarks.serving.clients import LONGEST_SILENCE_S, Asked, NoAnswer, Question, run
from benchmarks.serving.continuous_batching import GONE_S, KEY
from benchmarks.support.decoders import DrawnWeights, decoder
from benchmarks.support.ranks import ROOT
from benchmarks.support.several import device_name, options
from partitioner import CacheSize, Plan, launch
from partitioner.errors import PartitionerError
from partitioner.serving.load.workload import Workload
from runtime.launching.jobs import Call
from runtime.launching.launched import Launched

LONGEST = 2048
BESIDE, LONG = 16, 8192
WARM_UP_S = 6.0
PATIENCE_S = 15.0


def written(folder: Path, given: argparse.Namespace) -> int:
    """A checkpoint of drawn weights; how many words it knows."""
    device = torch.device(given.device)
    model = decoder("small" if given.small else "8b", layers=given.layers, positions=LONG + LONGEST, device=device)
    weights = DrawnWeights(model, device)
    held = model.to_empty(device=device)
    for name, each in (*held.named_parameters(), *held.named_buffers()):
        each.data.copy_(weights(name, tuple((0, size) for size in each.shape)))
    held.save_pretrained(folder)
    return int(model.config.vocab_size)


def drawn(lengths: list[int], words: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(words) for _ in range(length)] for length in lengths]


def conversation(requests: int, given: argparse.Namespace, words: int, seed: int) -> list[Question]:
    mean = {"prompt_mean": 12.0, "answer_mean": 8.0, "longest": 40} if given.small else {"longest": LONGEST}
    asked = Workload(requests=requests, clients=given.clients, seed=seed, **mean).questions()  # type: ignore[arg-type]
    ids = drawn([len(each.prompt.split()) for each in asked], words, seed)
    return [(prompt, each.new) for prompt, each in zip(ids, asked, strict=True)]


class Ours:
    """As `clients.Side`."""

    def __init__(self, llm: Launched) -> None:
        self._llm = llm
        self._over: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._asked: set[Call] = set()

    def ask(self, question: Question) -> None:
        ids, new = question
        call = self._llm.begin([ids], heard=lambda: None, max_new_tokens=new, do_sample=False)
        self._asked.add(call)
        call.futures[0].add_done_callback(lambda _: self._over.put(call))

    def answered(self, timeout_s: float) -> int | None:
        try:
            call = self._over.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if call not in self._asked:
            return None  # of a round before, given up
        self._asked.remove(call)
        try:
            return len(call.futures[0].result())
        except PartitionerError as error:
            raise NoAnswer(str(error)) from error

    def under_way(self) -> int:
        return sum(len(call.come(0)) for call in self._asked)

    def give_up(self) -> None:
        for call in self._asked:
            self._llm.leave(call)
        self._asked.clear()
        deadline = time.perf_counter() + GONE_S
        while self._llm.status().running:
            if time.perf_counter() > deadline:
                raise NoAnswer(f"requests that were given up are still there after {GONE_S:.0f} s")
            time.sleep(0.05)


def show_stacks() -> None:
    """Of all processes that this one has started, which end with it: Python's fault handler is on in them."""
    found, left = [], [os.getpid()]
    while left:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for task in Path(f"/proc/{left.pop()}/task").iterdir():
                children = [int(each) for each in (task / "children").read_text().split()]
                found, left = found + children, left + children
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGABRT)


class Theirs:
    """The ranks of transformers, from when `start` is called; they begin while ours do."""

    def __init__(self, folder: Path, given: argparse.Namespace, tokens: int) -> None:
        self._folder, self._given, self._tokens = folder, given, tokens
        self._connection: Connection | None = None

    def start(self, closing: ExitStack) -> None:
        listener = closing.enter_context(Listener(("127.0.0.1", 0), authkey=KEY))
        port, given = str(listener.address[1]), self._given
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.ranks}"]
        command += ["-m", "benchmarks.serving.continuous_batching", str(self._folder), port, given.device]
        self._process = subprocess.Popen([*command, str(given.clients), str(self._tokens)], cwd=ROOT)
        closing.callback(self._end)
        self._came: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        # what waits for a connection that never comes cannot be told to stop
        threading.Thread(target=lambda: self._came.put(listener.accept()), daemon=True).start()

    def ready(self, timeout_s: float) -> str:
        """What it is ready with."""
        deadline = time.perf_counter() + timeout_s
        while self._connection is None:
            try:
                self._connection = self._came.get(timeout=0.5)
            except queue.Empty:
                self._require_alive(deadline, f"were not ready within {timeout_s:.0f} s")
        return str(self._told(deadline)[1])

    def run(self, questions: list[Question], clients: int, seconds: float) -> Asked:
        assert self._connection is not None
        self._connection.send((questions, clients, seconds))
        deadline = time.perf_counter() + seconds + LONGEST_SILENCE_S + GONE_S
        while True:
            kind, what = self._told(deadline)
            if kind == "asked":
                assert isinstance(what, Asked)
                return what
            if kind == "failed":
                raise NoAnswer(what)
            print(f"    transformers: {what}", flush=True)

    def _told(self, deadline: float) -> tuple[str, object]:
        assert self._connection is not None
        while not self._connection.poll(0.5):
            self._require_alive(deadline, "say nothing any more")
        try:
            kind, what = self._connection.recv()
        except EOFError as error:
            raise NoAnswer("transformers' first rank has ended (why, it says above)") from error
        return kind, what

    def _require_alive(self, deadline: float, why: str) -> None:
        if self._process.poll() is not None:
            raise NoAnswer(f"transformers' ranks have ended with {self._process.returncode} (why, they say above)")
        if time.perf_counter() > deadline:
            raise NoAnswer(f"transformers' ranks {why}")

    def _end(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.send(None)
        else:
            self._process.terminate()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(PATIENCE_S)


def token_times(llm: Launched, ids: list[int], new: int) -> list[float]:
    """When it was asked for, and when each token came."""
    times = [time.perf_counter()]
    for _ in llm.stream([ids], max_new_tokens=new, do_sample=False):
        times.append(time.perf_counter())
    return times


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def stall(llm: Launched, given: argparse.Namespace, words: int) -> None:
    long, new = (40, 24) if given.small else (LONG, 256)
    prompts = drawn([long] * 8, words, 3)  # each another: prefixes are reused
    few = drawn([128 if not given.small else 8] * BESIDE, words, 4)
    alone = statistics.median([(t := token_times(llm, prompts.pop(), 1))[1] - t[0] for _ in range(4)][1:])

    def beside(prompt: list[int] | None) -> tuple[list[list[float]], list[float]]:
        with ThreadPoolExecutor(BESIDE + 1) as pool:
            rows = [pool.submit(token_times, llm, ids, new) for ids in few]
            if prompt is None:
                return [row.result() for row in rows], []
            time.sleep(0.3 * quiet_s)
            asked = pool.submit(token_times, llm, prompt, 1)
            return [row.result() for row in rows], asked.result()

    quiet_s = 0.0
    for _ in range(2):  # the first one captures
        quiet, _ = beside(None)
        quiet_s = max(row[-1] for row in quiet) - min(row[0] for row in quiet)
    rounds = [beside(prompts.pop()) for _ in range(3)]

    def per_token(rows: list[list[float]]) -> list[float]:
        return [(row[-1] - row[1]) / (len(row) - 2) for row in rows]

    def gaps(rows: list[list[float]], begin: float = 0.0, end: float = float("inf")) -> list[float]:
        pairs = [pair for row in rows for pair in itertools.pairwise(row[1:])]
        return [late - early for early, late in pairs if late >= begin and early <= end]

    before, before_gap = p99(per_token(quiet)), p99(gaps(quiet))
    amid = statistics.median(p99(per_token(rows)) for rows, _ in rounds)
    amid_gap = statistics.median(p99(gaps(rows, *times)) for rows, times in rounds)
    first = statistics.median(times[1] - times[0] for _, times in rounds)
    print(
        f"  a prompt of {long} tokens amid {BESIDE} rows of {new} new tokens: p99 of TPOT {1e3 * before:.2f} ms "
        f"without, {1e3 * amid:.2f} with: {amid / before:.2f} (asked at most 2); p99 of gaps while it runs "
        f"{1e3 * amid_gap:.1f} ms over {1e3 * before_gap:.1f}: {amid_gap / before_gap:.2f}\n"
        f"  its first token after {1e3 * alone:.0f} ms alone, {1e3 * first:.0f} amid them: {first / alone:.2f} (asked "
        "at most 3)",
        flush=True,
    )


def load(llm: Launched, other: Theirs, given: argparse.Namespace, words: int) -> bool:
    """Whether both sides have a figure."""
    ours, failure, is_ready = Ours(llm), "", False
    speeds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for number in range(-1, given.rounds):  # one round before, in which both warm up
        questions = conversation(given.clients if number < 0 else given.requests, given, words, seed=number + 1)
        seconds = min(given.seconds, WARM_UP_S) if number < 0 else given.seconds
        name = "warm-up" if number < 0 else f"round {number}"
        for side in speeds:
            if side == "transformers" and failure:
                continue
            try:
                if side == "transformers" and not is_ready:
                    print(f"  {other.ready(given.start)}", flush=True)
                    is_ready = True
                if side == "ours":
                    asked = run(
                        ours, questions, clients=given.clients, seconds=seconds,
                        say=lambda text: print(f"    ours: {text}", flush=True),
                    )  # fmt: skip
                else:
                    asked = other.run(questions, given.clients, seconds)
            except NoAnswer as error:
                if side == "ours":
                    show_stacks()
                    time.sleep(2.0)
                    raise
                failure = str(error)
                continue
            print(f"  {name}: {side:12} {asked.tokens_per_s:7.0f} new tokens per second: {asked}", flush=True)
            if number >= 0:
                speeds[side].append(asked.tokens_per_s)
    mine = statistics.median(speeds["ours"])
    if failure:
        print(f"  load: ours {mine:.0f} new tokens per second; transformers has no figure: {failure}")
        return False
    ratio = statistics.median(a / b for a, b in zip(speeds["ours"], speeds["transformers"], strict=True))
    print(
        f"  load: {given.clients} clients, ours {mine:.0f} new tokens per second: {ratio:.2f} times transformers' "
        "(asked at least 1.5)"
    )
    return True


def main() -> None:
    parser = options(__doc__, rounds=2)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256, help="of a round at most")
    parser.add_argument("--seconds", type=float, default=8.0, help="that a side has for a round at most")
    parser.add_argument("--start", type=float, default=120.0, help="seconds that each side has to start")
    parser.add_argument("--budgets", type=int, nargs="+", help="stall: tokens of prompts in a step, beside the default")
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--compile", action="store_true", help="ours: steps compiled by torch as well")
    parser.add_argument("--parts", nargs="+", choices=("load", "stall"), default=["load", "stall"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ["PYTHONFAULTHANDLER"] = "1"  # so that a signal shows where a rank is
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    tokens = given.clients * (64 if given.small else LONGEST) + LONG + LONGEST
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory)))
        words = written(folder, given)
        if given.device == "cuda":
            torch.cuda.empty_cache()
        other = Theirs(folder, given, tokens)
        if "load" in given.parts:
            other.start(stack)
        began = time.perf_counter()
        cache = CacheSize(max_batch=1, max_length=tokens)
        late = threading.Timer(given.start, show_stacks)
        late.daemon = True
        late.start()
        llm = stack.enter_context(
            launch(
                folder,
                Plan(tp=given.ranks),
                device=given.device,
                cuda_graph=given.device == "cuda",
                compile=given.compile,
                max_batch=max(given.clients, BESIDE + 1),
                cache=cache,
            )
        )
        late.cancel()
        card = "CPU" if given.device == "cpu" else device_name(torch.device("cuda", 0))
        print(
            f"{given.ranks} x {card}, tp={given.ranks}; ours started in {time.perf_counter() - began:.0f} s, its steps "
            "captured",
            flush=True,
        )
        is_whole = load(llm, other, given, words) if "load" in given.parts else True
        if "stall" in given.parts:
            stall(llm, given, words)
            for budget in given.budgets or ():
                llm.reserve(replace(cache, prefill_step=budget))
                print(f"  with a budget of {budget} tokens a step:", flush=True)
                stall(llm, given, words)
    if not is_whole:
        sys.exit(1)


if __name__ == "__main__":
    main()
