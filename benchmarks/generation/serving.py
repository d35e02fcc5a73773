"""Requests of many clients at once over a launched model, against the same requests one after the other.

    throughput    new tokens per second of N clients together, over those of one client who waits for each answer
    prefixes      prompt tokens that are run where all prompts begin alike, over one prefix and the tails

The example model that comes along, in float64, so that every request is told the same both ways; that is checked. The
ways take turns on the same ranks. Prompts of both kinds differ, so that none finds another's tokens in the cache.

    python -m benchmarks.generation.serving                        about a minute on an idle machine
    python -m benchmarks.generation.serving --plan tp=2 --clients 4 --tokens 16
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import partitioner
from partitioner import CacheSize, Plan
from partitioner.storage.example import EXAMPLE_MODEL

PROMPT, PREFIX, SHARING = 24, 2000, 32


def prompts(count: int, draw: random.Random, *, length: int = PROMPT) -> list[list[int]]:
    return [[draw.randrange(3, 500) for _ in range(length)] for _ in range(count)]


def one_by_one(llm: Any, texts: list[list[int]], **options: Any) -> list[list[int]]:
    return [llm.submit([text], **options)[0].result() for text in texts]


def together(llm: Any, texts: list[list[int]], **options: Any) -> list[list[int]]:
    futures = [llm.submit([text], **options)[0] for text in texts]
    return [future.result() for future in futures]


def throughput(llm: Any, clients: int, tokens: int, rounds: int) -> None:
    draw = random.Random(0)
    options = {"max_new_tokens": tokens, "eos_token_id": []}
    times: dict[str, list[float]] = {"one by one": [], "together": []}
    for at in range(rounds + 1):
        texts = prompts(clients, draw)
        said = []
        ways = [("one by one", one_by_one), ("together", together)]
        for name, run in ways if at % 2 else ways[::-1]:
            # other prompts of the same lengths first: neither way finds its own in the cache
            start = time.perf_counter()
            said.append(run(llm, [[3 + len(said), *text] for text in texts], **options))
            if at:  # the first round is the warm-up
                times[name].append(time.perf_counter() - start)
    check = [[3, *text] for text in prompts(4, draw)]
    if one_by_one(llm, check, **options) != together(llm, check, **options):
        sys.exit("the same requests were told other tokens together than alone")
    alone, many = (statistics.median(each) for each in times.values())
    each = clients * tokens
    print(f"{clients} requests of {PROMPT} + {tokens} tokens: {each / alone:.0f} tokens/s one by one, "
          f"{each / many:.0f} together")  # fmt: skip
    print(f"ratio {alone / many:.2f}")


def prefixes(llm: Any) -> None:
    draw = random.Random(7)
    (prefix,) = prompts(1, draw, length=PREFIX)
    tails = [[draw.randrange(3, 500) for _ in range(1 + number % 8)] for number in range(SHARING)]
    before = sum(each.prefill_tokens for each in llm.status().replicas)
    together(llm, [prefix + tail for tail in tails], max_new_tokens=4, eos_token_id=[])
    run = sum(each.prefill_tokens for each in llm.status().replicas) - before
    replicas = len(llm.status().replicas)
    least = replicas * PREFIX + sum(map(len, tails))
    print(f"{SHARING} prompts with {PREFIX} tokens in common: {run} tokens run, of {sum(map(len, tails))} in tails")
    print(f"ratio to one prefix per replica and the tails: {run / least:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Plan.parse, default=Plan())
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    size = CacheSize(max_batch=32, max_length=2304, prefill_step=512)
    with partitioner.launch(EXAMPLE_MODEL, given.plan, dtype=torch.float64, cache=size) as llm:
        throughput(llm, given.clients, given.tokens, given.rounds)
        prefixes(llm)


if __name__ == "__main__":
    main()
