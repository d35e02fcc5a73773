"""Ranks of a job over several hosts, which are network namespaces; forked from one process that has imported all.

python -P -m tests.faults.two_hosts_rank      reads lines of JSON, and answers each with one

    {"plan": .., "new": .., "folder": .., "ranks": [[pid of a host, {variables}], ..]}    starts them: their pids
    {"wait_s": ..}                       [[when it ended, by the monotonic clock, how], ..]; those left are killed

A rank leaves FOLDER/ready-RANK once it generates, what it says in FOLDER/said-RANK, and its tokens in
FOLDER/tokens-RANK.
"""

import functools
import gc
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from partitioner import Plan, partition
from partitioner.compile.parts import Parts
from partitioner.errors import RankLost
from runtime.engine import Engine
from tests.security.jobs.doors import go_to

PROMPTS = [[1, 2, 3], [4, 5], [6]]
TIMEOUT_S = 8.0


@functools.cache
def tiny(plan: str) -> Parts[Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, eos_token_id=None, bos_token_id=None, max_position_embeddings=100_000,
    )  # fmt: skip
    parts = partition(LlamaForCausalLM(config).eval().double(), Plan.parse(plan))
    parts.entry("decode", 0)
    return parts


def rank(number: int, parts: Parts[Any], new: int, folder: Path) -> None:
    with Engine.connect(parts, timeout_s=TIMEOUT_S) as engine:
        tokens = []
        for step in engine.stream(PROMPTS, max_new_tokens=new):
            tokens.append(step.tokens)
            if len(tokens) == 5:
                (folder / f"ready-{number}").touch()
    (folder / f"tokens-{number}").write_text(json.dumps(tokens))


def start(case: dict[str, Any]) -> list[int]:
    parts, folder = tiny(case["plan"]), Path(case["folder"])
    pids = []
    for number, (host, variables) in enumerate(case["ranks"]):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            with (folder / f"said-{number}").open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            go_to(host)
            os.environ |= variables
            logging.basicConfig()
            rank(number, parts, case["new"], folder)
            code = 0
        except RankLost as error:
            print(f"RankLost: {error}", flush=True)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(code)  # at once: torch takes its time to clear away
    return pids


def wait(pids: list[int], wait_s: float) -> list[tuple[float, int]]:
    ended: dict[int, tuple[float, int]] = {}
    deadline = time.monotonic() + wait_s
    while len(ended) < len(pids):
        for pid in pids:
            if time.monotonic() > deadline and pid not in ended:
                os.kill(pid, signal.SIGKILL)
            if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                ended[pid] = time.monotonic(), os.waitstatus_to_exitcode(found[1])
        time.sleep(0.005)
    return [ended[pid] for pid in pids]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    pids: list[int] = []
    for line in sys.stdin:
        told = json.loads(line)
        if "plan" in told:
            gc.freeze()  # a rank that ends would else look at, and so copy, all that was made here
            pids = start(told)
        answers.write(json.dumps(pids if "plan" in told else wait(pids, told["wait_s"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
