"""Tokens per second of `partitioner serve` and `transformers serve --continuous-batching`: same model, same requests.

    python -m benchmarks.serving    # the model that comes along, 16 clients, 3 rounds
    python -m benchmarks.serving --model FOLDER --plan tp=2 --clients 16

Both servers run at the same time, with the same threads, and are asked in turns, so that what else the machine does
falls on both. Each round asks both the same; the last lines are the median of the rounds' ratios, of tokens per second
and of the 99th percentile of the time per token, which is taken over the answers of all rounds as well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from partitioner.serving.load.ask import Answered, ask_all, model_of
from partitioner.serving.load.measures import Measures
from partitioner.serving.load.workload import Workload
from partitioner.serving.text.tokenizer import load_tokenizer
from partitioner.storage.example import EXAMPLE_MODEL

START_S = 300
BLOCK = 32
THEIRS = "from transformers.cli.transformers import main; main()"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path, ready: str) -> Iterator[None]:
    """A server, from when its log says `ready` on."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        deadline = time.monotonic() + START_S
        while not re.search(ready, log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measured(url: str, model: str, workload: Workload, cut: object) -> Measures:
    questions = workload.questions(cut=cut)  # type: ignore[arg-type]
    asking = ask_all(questions, url=url, model=model, key=None, clients=workload.clients, timeout_s=300)
    return Measures(tuple(asyncio.run(asking)))


def late(measures: Measures) -> float:
    """The 99th percentile of the time per token."""
    found: float = measures.data()["seconds"]["TPOT"]["p99"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EXAMPLE_MODEL))
    parser.add_argument("--plan", default="tp=1")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-mean", type=float, default=60)
    parser.add_argument("--answer-mean", type=float, default=60)
    parser.add_argument("--longest", type=int, default=500)
    given = parser.parse_args()
    tokenizer, _ = load_tokenizer(given.model)

    def cut(words: str, tokens: int) -> str:
        return str(tokenizer.decode(tokenizer(words)["input_ids"][:tokens]))

    ours, theirs = free_port(), free_port()
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, "-m", "partitioner", "serve", given.model, "--device", "cpu", "--plan", given.plan]
        stack.enter_context(running([*command, "--port", str(ours)], logs / "ours", "ready in"))
        command = [sys.executable, "-c", THEIRS, "serve", given.model, "--continuous-batching", "--device", "cpu"]
        command += ["--port", str(theirs), "--log-level", "info"]
        # room for all, in place of nine tenths of the machine's memory
        blocks = -(-2 * given.clients * given.longest // BLOCK)
        command += ["--cb-block-size", str(BLOCK), "--cb-num-blocks", str(blocks)]
        stack.enter_context(running(command, logs / "theirs", "startup complete|Uvicorn running"))
        servers = {"partitioner": (ours, ""), "transformers": (theirs, given.model)}
        servers["partitioner"] = (ours, model_of(f"http://127.0.0.1:{ours}/v1", None))
        ratios, late_ratios = [], []
        all_answered: dict[str, list[Answered]] = {name: [] for name in servers}
        for number in range(-1, given.rounds):
            found = {}
            for name, (port, model) in servers.items():
                workload = Workload(
                    requests=given.clients if number < 0 else given.requests,
                    clients=given.clients,
                    prompt_mean=given.prompt_mean,
                    answer_mean=given.answer_mean,
                    longest=given.longest,
                    seed=number + 1,
                )
                measures = measured(f"http://127.0.0.1:{port}/v1", model, workload, cut)
                if len(measures.good) < len(measures.answered):
                    print(next(each.error for each in measures.answered if each.error))
                    sys.exit(f"{name} did not answer all:\n{(logs / 'theirs').read_text(errors='replace')[-3000:]}")
                found[name] = measures
                if number >= 0:
                    all_answered[name] += measures.answered
                    times = measures.data()["seconds"]
                    spread = ", ".join(
                        f"{what} {1e3 * times[what]['p50']:.0f}/{1e3 * times[what]['p99']:.0f}" for what in times
                    )
                    print(f"round {number}: {name:12} {measures.tokens_per_s:8.1f} tokens/s; p50/p99 ms: {spread}")
            if number >= 0:
                ratios.append(found["partitioner"].tokens_per_s / found["transformers"].tokens_per_s)
                late_ratios.append(late(found["partitioner"]) / late(found["transformers"]))
        print(f"{given.clients} clients, {given.plan}: ratio {statistics.median(ratios):.2f} (target 1.3)")
        ours_ms, theirs_ms = (1e3 * late(Measures(tuple(all_answered[name]))) for name in servers)
        print(
            f"p99 of TPOT: ratio {statistics.median(late_ratios):.2f} (target at most 1); of all rounds' answers "
            f"{ours_ms:.0f} ms against {theirs_ms:.0f} ms"
        )


if __name__ == "__main__":
    main()
