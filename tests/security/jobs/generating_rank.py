"""One rank that generates until it is told to stop: `python -P -m tests.security.jobs.generating_rank SHARING FOLDER`.

It leaves FOLDER/pid-RANK; rank 1 connects once FOLDER/come is there. It generates the same tokens again and again, and
leaves FOLDER/ready-RANK after the first time; the ranks stop together once FOLDER/go is there. It answers with the
tokens of every round.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from partitioner import Plan, partition
from partitioner.compile.parts import Parts
from runtime.engine import Engine
from runtime.processes.launch import begin_worker, write_answer

PROMPTS = [[1, 2, 3], [4, 5]]
NUM_TOKENS = 60


def tiny() -> Parts[Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return partition(LlamaForCausalLM(config).eval(), Plan(tp=2))


def main(sharing: Any, folder: Path) -> None:
    rank = os.environ["RANK"]
    begin_worker()
    parts = tiny()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    while rank == "1" and not (folder / "come").exists():
        time.sleep(0.01)
    rounds = []
    with Engine.connect(parts, timeout_s=300, shared_memory=sharing) as engine:
        agree = engine.communicator.channel("tp", node="stop").prepare("all_reduce")
        is_over = False
        while not is_over:
            rounds.append(engine.generate(PROMPTS, max_new_tokens=NUM_TOKENS).tolist())
            (folder / f"ready-{rank}").touch()
            is_over = bool(agree(torch.tensor([float((folder / "go").exists())])) == 2)
    write_answer(json.dumps(rounds).encode())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
