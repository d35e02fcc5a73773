"""Many requests at once over GPUs of one host, without HTTP: ours, and transformers' continuous batching.

    load    as many clients as `--clients`, each of which asks again when it is answered; lengths as of conversations.
            New tokens per second of `partitioner.launch` over those of transformers, both with tensor parallelism
    stall   ours alone: 16 rows are continued, and a prompt of 8,192 tokens comes. The 99th percentile of the time per
            token of the 16 (by answers, and by gaps between two tokens while the prompt runs), over what it is without;
            and the time to the prompt's first token, over what it is by itself

Both have drawn weights of one folder, which lies in memory, room for the same number of tokens, and processes of their
own, on the same GPUs at the same time; they are asked in turns. transformers' ranks are started by torchrun.

    python -m benchmarks.serving.on_gpus --ranks 2
    python -m benchmarks.serving.on_gpus --ranks 2 --device cpu --small --rounds 1
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import torch
import transformers

from benchmarks.serving.continuous_batching import KEY, Question
from benchmarks.support.decoders import DrawnWeights, decoder
from benchmarks.support.ranks import ROOT
from benchmarks.support.several import device_name, options
from partitioner import CacheSize, Plan, launch
from partitioner.serving.load.workload import Workload
from runtime.launching.launched import Launched

LONGEST = 2048
BESIDE, LONG = 16, 8192


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


def seconds_of(llm: Launched, questions: list[Question], clients: int) -> float:
    def ask(question: Question) -> None:
        ids, new = question
        (answer,) = llm.submit([ids], max_new_tokens=new, do_sample=False)
        if len(answer.result(timeout=600)) != new:
            sys.exit("an answer is shorter than was asked for")

    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        list(pool.map(ask, questions))
        return time.perf_counter() - began


@contextmanager
def theirs(folder: Path, given: argparse.Namespace, tokens: int) -> Iterator[Connection]:
    """A connection to the first rank of transformers, which is ready."""
    with Listener(("127.0.0.1", 0), authkey=KEY) as listener:
        port = str(listener.address[1])
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={given.ranks}"]
        command += ["-m", "benchmarks.serving.continuous_batching", str(folder), port, given.device]
        process = subprocess.Popen([*command, str(given.clients), str(tokens)], cwd=ROOT)
        ended = threading.Thread(target=lambda: process.wait() and listener.close(), daemon=True)
        ended.start()
        try:
            with listener.accept() as connection:
                connection.recv()
                yield connection
                connection.send(None)
                process.wait(30)
        finally:
            process.terminate()
            process.wait(30)


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


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256, help="of a round")
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--compile", action="store_true", help="ours: steps compiled by torch as well")
    parser.add_argument("--parts", nargs="+", choices=("load", "stall"), default=["load", "stall"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    tokens = given.clients * (64 if given.small else LONGEST) + LONG + LONGEST
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory)))
        words = written(folder, given)
        if given.device == "cuda":
            torch.cuda.empty_cache()
        began = time.perf_counter()
        llm = stack.enter_context(
            launch(
                folder,
                Plan(tp=given.ranks),
                device=given.device,
                cuda_graph=given.device == "cuda",
                compile=given.compile,
                max_batch=max(given.clients, BESIDE + 1),
                cache=CacheSize(max_batch=1, max_length=tokens),
            )
        )
        card = "CPU" if given.device == "cpu" else device_name(torch.device("cuda", 0))
        print(
            f"{given.ranks} x {card}, tp={given.ranks}; ours started in {time.perf_counter() - began:.0f} s", flush=True
        )
        if "stall" in given.parts:
            stall(llm, given, words)
        if "load" in given.parts:
            load(llm, stack.enter_context(theirs(folder, given, tokens)), given, words)


def load(llm: Launched, other: Connection, given: argparse.Namespace, words: int) -> None:
    ratios = []
    for number in range(-1, given.rounds):  # one round before, in which both capture
        requests = given.clients if number < 0 else given.requests
        questions = conversation(requests, given, words, seed=number + 1)
        ours_s = seconds_of(llm, questions, given.clients)
        other.send((questions, given.clients))
        theirs_s = float(other.recv())
        if number >= 0:
            new = sum(new for _, new in questions)
            ratios.append(theirs_s / ours_s)
            print(
                f"  round {number}: {len(questions)} requests of {given.clients} clients: {new / ours_s:.0f} new "
                f"tokens per second, transformers {new / theirs_s:.0f}: {ratios[-1]:.2f}",
                flush=True,
            )
    print(f"  load: {statistics.median(ratios):.2f} times transformers' (asked at least 1.5)")


if __name__ == "__main__":
    main()
