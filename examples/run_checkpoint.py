"""Continue prompts with a checkpoint, one process per rank, on CPUs or GPUs, on one host or several.

    torchrun --nproc-per-node 2 examples/run_checkpoint.py FOLDER --prompt "Return a list of"

FOLDER has a config, safetensors files and a tokenizer; by default it is the small model that comes with the package.
Every process traces the model, reads its own slices of the weights, and returns the same text; rank 0 prints it.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: it reads this once

import torch
from torch import Tensor
from transformers import AutoTokenizer

from partitioner import CacheSize, Plan, partition
from partitioner.storage.example import EXAMPLE_MODEL
from runtime.engine import Engine
from runtime.processes.launch import begin_worker


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=str(EXAMPLE_MODEL))
    parser.add_argument("--prompt", action="append", required=True, help="given several times: a batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-length", type=int, default=512, help="of a prompt and what follows it, in tokens")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument(
        "--timeout-s", type=float, default=60.0, help="how long ranks wait for one that does not answer"
    )
    return parser.parse_args()


def main() -> None:
    given = arguments()
    begin_worker()
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in given.prompt]
    plan = Plan(tp=int(os.environ["WORLD_SIZE"]))
    parts = partition(given.folder, plan, dtype=getattr(torch, given.dtype), max_length=given.max_length)
    cache = CacheSize(max_batch=len(prompts), max_length=given.max_length)
    with Engine.connect(parts, device=given.device, timeout_s=given.timeout_s, cache=cache) as engine:
        written = engine.generate(prompts, max_new_tokens=given.max_new_tokens)
        assert isinstance(written, Tensor)  # with logprobs=True it is more than that
        if engine.program.rank == 0:
            print(f"{plan} on {engine.device.type}")
            longest = max(map(len, prompts))
            for row, prompt in zip(written.tolist(), prompts, strict=True):
                # shorter prompts are padded on the left
                print(tokenizer.decode(row[longest - len(prompt) :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
