"""A rank of transformers' continuous batching, with its own tensor parallelism; `on_gpus.py` starts it by torchrun.

    torchrun --nproc-per-node 2 -m benchmarks.serving.continuous_batching FOLDER PORT DEVICE ROWS TOKENS

The first rank says "ready" to who listens at the port; then, until it is told None, it is sent lists of (ids, how many
new tokens) with how many of them run at a time, and answers with the seconds that all of them took.
"""

from __future__ import annotations

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

BLOCK = 32
KEY = b"benchmark"
Question = tuple[list[int], int]


def seconds_of(manager: Any, questions: list[Question], clients: int) -> float:
    """As many at a time as there are clients, each of which asks again when it is answered."""
    began = time.perf_counter()
    left = iter(questions)

    def ask() -> None:
        for ids, new in left:
            manager.add_request(ids, max_new_tokens=new)
            return

    for _ in range(clients):
        ask()
    for _ in questions:
        answer = None
        while answer is None:  # nothing within the time is None too
            answer = manager.get_result(timeout=60)
            if answer is None and not manager.is_running():
                sys.exit("transformers' continuous batching has ended")
        if answer.error:
            sys.exit(f"transformers' continuous batching: {answer.error}")
        ask()
    return time.perf_counter() - began


def main() -> None:
    folder, port, device, rows, tokens = sys.argv[1:]
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    blocks = -(-int(tokens) // BLOCK)
    setting = ContinuousBatchingConfig(
        block_size=BLOCK, num_blocks=blocks, max_requests_per_batch=int(rows), allow_block_sharing=False
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
                asker.send("ready")
                while (asked := asker.recv()) is not None:
                    asker.send(seconds_of(manager, *asked))
        dist.barrier(waiting)
    sys.stdout.flush()
    os._exit(0)  # its threads are of no more use


if __name__ == "__main__":
    main()
