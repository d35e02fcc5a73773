"""How evenly pipeline stages share a decode step, with the vocabulary projection on the last stage and shared out.

    python -m benchmarks.planning.balance [--pp 8] [--tp 1] [NAME ...]

Mean over the largest predicted stage time, 1 where all stages take equally long, on the meta device. `cycle`: what a
slot of the ring takes, in gigabytes read, meetings of all stages included; the less is chosen.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from partitioner.analysis.stages.choose_cuts import LINK, MEETING
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.program.plan import Plan
from partitioner.program.program import Program

SHAPES = Path(__file__).parent / "shapes"
ENOUGH = 0.97
OF_OTHERS: dict[str, dict[str, Any]] = {
    "gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "gemma-2-2b": {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
    },
}  # fmt: skip
NAMES = ("qwen3-32b", "llama-3.1-70b", "gpt2-xl", "llama-3.2-1b", "gemma-2-2b")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--pp", type=int, default=8)
    parser.add_argument("--tp", type=int, default=1)
    asked = parser.parse_args()
    for name in asked.names:
        start = time.process_time()
        program = traced(name)
        found = {how: _stages(program, asked.pp, asked.tp, how) for how in (False, True, None)}
        chosen = found[None]
        print(
            f"{name} pp={asked.pp},tp={asked.tp}: mean over slowest {found[False].evenness:.1%} with the projection on "
            f"the last stage (cycle {found[False].cycle / 1e9:.2f} GB), {found[True].evenness:.1%} shared out "
            f"({found[True].cycle / 1e9:.2f} GB); chosen: {'shared out' if chosen.shares else 'last stage'}, "
            f"{chosen.evenness:.1%}, {'enough' if chosen.evenness >= ENOUGH else 'LESS than'} {ENOUGH:.0%}; "
            f"{time.process_time() - start:.1f} s",
            flush=True,
        )


def traced(name: str) -> Program:
    """In bfloat16, without weights."""
    given = dict(OF_OTHERS[name]) if name in OF_OTHERS else json.loads((SHAPES / f"{name}.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given), dtype=torch.bfloat16)
    return trace(model.eval())


class _Found:
    def __init__(self, evenness: float, cycle: float, shares: bool) -> None:
        self.evenness, self.cycle, self.shares = evenness, cycle, shares


def _stages(program: Program, pp: int, tp: int, share_head: bool | None) -> _Found:
    options = {"balance": "decode", "share_head": share_head}
    table = compile_program(program, Plan(pp=pp, tp=tp, passes=[("pipeline", options)])).program.stages
    assert table is not None
    mean = sum(table.costs) / table.count
    handed = [*table.crossing_bytes, 0][: table.count]
    cycle = max(cost + LINK * size for cost, size in zip(table.costs, handed, strict=True))
    return _Found(mean / max(table.costs), cycle + 2 * MEETING * table.shares_head, table.shares_head)


if __name__ == "__main__":
    main()
