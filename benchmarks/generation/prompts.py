"""A prompt of models that remember states: ours against transformers, in one process.

    parts.generate(ids, max_new_tokens=1)    against    model.generate(ids, max_new_tokens=1)

Small models with random weights (fixed seeds), float32, one thread of a CPU or a GPU: scans, convolutions and delta
rules, alone and beside attention. The two take turns, and what is printed is the ratio of the medians, ours / theirs:
below 1 we are faster. In brackets are the quartiles of that ratio within a round. The tokens that follow the prompt
must be those of transformers' own generate.

    python -m benchmarks.generation.prompts                        all, about ten minutes, most of it compiling
    python -m benchmarks.generation.prompts lfm2 --tokens 512      one of them
    python -m benchmarks.generation.prompts --device cuda          and single tokens besides, captured
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.support.rounds import Ratio, rounds_in, take_turns
from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup

VOCABULARY, HIDDEN, LAYERS, FOLLOWING = 512, 256, 4, 8
_ATTENTION = {"num_attention_heads": 8, "num_key_value_heads": 4}
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": 512}
_SCAN = {"mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_state": 64, "mamba_n_groups": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
MODELS: dict[str, dict[str, Any]] = {
    "mamba": {**_SIZES, "state_size": 16},
    "mamba2": {**_SIZES, "state_size": 64, "num_heads": 16, "head_dim": 32, "n_groups": 2},
    "bamba": {**_SIZES, **_ATTENTION, **_SCAN, "attn_layer_indices": [2]},
    "qwen3_next": {
        **_SIZES, **_ATTENTION, **_EXPERTS, "head_dim": 32, "shared_expert_intermediate_size": 256,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    },
    "falcon_h1": {**_SIZES, **_ATTENTION, **_SCAN, "mamba_d_ssm": 512, "head_dim": 32},
    "lfm2": {**_SIZES, **_ATTENTION, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "granitemoehybrid": {
        **_SIZES, **_ATTENTION, **_SCAN, "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 256,
    },
}  # fmt: skip


def build(name: str) -> Any:
    """Small and random; no token of theirs ends a text."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **MODELS[name])
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, token, 0 if token == "pad_token_id" else None)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def ask(runner: Any, ids: Tensor, count: int, **options: Any) -> Any:
    return runner.generate(ids, max_new_tokens=count, do_sample=False, **options)


def waited(found: Any) -> Any:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found


def single_tokens(runner: Any, model: Any, ids: Tensor) -> str:
    """One token after the prompt, in milliseconds: 64 more of them, over 64."""
    found = {}
    for who, one in (("ours, captured", runner), ("transformers", model)):
        contestants = {n: lambda n=n, one=one: waited(ask(one, ids, n)) for n in (FOLLOWING, FOLLOWING + 64)}
        times = take_turns({str(n): run for n, run in contestants.items()}, rounds=5)
        few, many = (min(times[str(n)]) for n in contestants)
        found[who] = (many - few) / 64 * 1e3
    return "a token: " + ", ".join(f"{who} {took:.2f} ms" for who, took in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="A prompt of models that remember states, against transformers.")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--prefill-step", type=int, help="how many tokens ours runs at a time; by default 512")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=20.0, help="per model; at least 5 rounds are run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    console = Console(width=None if sys.stdout.isatty() else 110)
    title = f"a prompt of {given.tokens} tokens: ours / transformers"
    table = Table(title=title, title_justify="left")
    for column in ("model", "ours ms", "transformers ms", "ratio", "at a time"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    ids = torch.randint(1, VOCABULARY, (1, given.tokens), generator=torch.Generator().manual_seed(0)).to(given.device)
    for name in given.models:
        model = build(name).to(given.device)
        parts = partition(model, Plan())
        runner: Any = parts
        if given.device == "cuda":
            runner = parts.engine(0, ThreadGroup(Mesh.of()).communicator(0), device="cuda", cuda_graph=True)
        ours, theirs = (ask(one, ids, FOLLOWING)[:, given.tokens :].tolist() for one in (runner, model))
        if ours != theirs:
            sys.exit(f"{name} continues otherwise: {ours}, transformers {theirs}")
        contestants = {
            "ours": lambda runner=runner: waited(ask(runner, ids, 1, prefill_step=given.prefill_step)),
            "theirs": lambda model=model: waited(ask(model, ids, 1)),
        }
        times = take_turns(contestants, rounds=rounds_in(given.seconds, contestants))
        most = parts.generation_report.tokens_at_a_time
        medians = [f"{torch.tensor(times[who]).median().item() * 1e3:.1f}" for who in contestants]
        table.add_row(name, *medians, str(Ratio.of(times["ours"], times["theirs"])), str(most or "any"))
        console.print(f"{name}: {Ratio.of(times['ours'], times['theirs'])} of {medians[1]} ms", markup=False)
        if given.device == "cuda":
            console.print(f"{name}: {single_tokens(runner, model, ids)}", markup=False)
        for note in parts.generation_report.notes:
            console.print(f"{name}: {note}", markup=False)
    console.print(table)


if __name__ == "__main__":
    main()
