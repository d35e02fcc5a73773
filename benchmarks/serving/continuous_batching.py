"""A rank of transformers' continuous batching, with its own tensor parallelism; `on_gpus.py` starts it by torchrun.

    torchrun --nproc-per-node 2 -m benchmarks.serving.continuous_batching FOLDER PORT DEVICE ROWS TOKENS

The first rank says what it is ready with to who listens at the port; then, until it is told None, it is sent rounds:
(questions, how many of them run at a time, for how many seconds at most). It answers ("far", text) now and then, and at
the end ("asked", what has come of it) or ("failed", why).

Its settings are transformers' own, but for the cache's room, the rows at a time, and the tokens of a step: without
these, it would take all memory for masks of more. Prefixes are not looked up, since no two prompts begin alike.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
import warnings
from multiprocessing.connection import Client
from typing import Any

os.environ.setdefault("NCCL_GRAPH_MIXING_SUPPORT", "0")  # as transformers asks, before it makes its groups

import torch
import transformers
from torch import distributed as dist
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.serving.clients import NoAnswer, Question, run

BLOCK = 32
STEP = 8192
"""Tokens of a step, transformers' default where the cache's size is not given."""
GONE_S = 20.0
KEY = b"benchmark"


class Theirs:
    """As `clients.Side`, over the manager of the first rank."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._asked: set[str] = set()

    def ask(self, question: Question) -> None:
        ids, new = question
        number = self._manager.add_request(ids, max_new_tokens=new)
        if number is None:
            raise NoAnswer("a request was not taken: its generation has ended")
        self._asked.add(number)

    def answered(self, timeout_s: float) -> int | None:
        answer = self._manager.get_result(timeout=timeout_s)
        if answer is None:
            if not self._manager.is_running():
                raise NoAnswer("its generation has ended (why, it has logged above)")
            return None
        if answer.error:
            raise NoAnswer(answer.error)
        if answer.request_id not in self._asked:
            return None  # of a round before, given up
        self._asked.remove(answer.request_id)
        return len(answer.generated_tokens)

    def under_way(self) -> int:
        active = dict(self._manager.batch_processor.scheduler.active_requests)
        return sum(state.generated_len() for number, state in active.items() if number in self._asked)

    def give_up(self) -> None:
        scheduler, deadline = self._manager.batch_processor.scheduler, time.perf_counter() + GONE_S
        for number in self._asked:
            self._manager.cancel_request(number)
        while scheduler.has_pending_requests():
            if time.perf_counter() > deadline:
                raise NoAnswer(f"requests that were given up are still there after {GONE_S:.0f} s")
            time.sleep(0.05)
        self._asked.clear()


def main() -> None:
    folder, port, device, rows, tokens = sys.argv[1:]
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    setting = ContinuousBatchingConfig(
        block_size=BLOCK,
        num_blocks=-(-int(tokens) // BLOCK),
        max_batch_tokens=STEP,
        max_requests_per_batch=int(rows),
        allow_block_sharing=False,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", attn_implementation="sdpa").eval()
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=16)
    running = model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=setting, block=False, timeout=5
    )
    waiting = dist.new_group(backend="gloo")
    with running as manager, torch.no_grad():
        if dist.get_rank() == 0:
            with Client(("127.0.0.1", int(port)), authkey=KEY) as asker:
                asker.send(("ready", f"transformers {transformers.__version__}, {model.config._attn_implementation}"))
                side = Theirs(manager)
                while (asked := asker.recv()) is not None:
                    questions, clients, seconds = asked
                    try:
                        found = run(
                            side, questions, clients=clients, seconds=seconds,
                            say=lambda text: asker.send(("far", text)),
                        )  # fmt: skip
                    except Exception as error:
                        faulthandler.dump_traceback()  # where its threads are
                        asker.send(("failed", f"{type(error).__name__}: {error}"))
                        break
                    asker.send(("asked", found))
        dist.barrier(waiting)
    sys.stdout.flush()
    os._exit(0)  # its threads are of no more use


if __name__ == "__main__":
    main()
