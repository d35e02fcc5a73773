"""A prompt of models that remember states: ours against transformers, in one process.

    parts.generate(ids, max_new_tokens=1)    against    model.generate(ids, max_new_tokens=1)

Small models with random weights (fixed seeds), float32, one thread of a CPU or a GPU: scans, convolutions and delta
rules, alone and beside attention. The two take turns, and what is printed is the ratio of the medians, ours / theirs:
below 1 we are faster. In brackets are the quartiles of that ratio within a round. The tokens that follow the prompt
must be those of transformers' own generate.

    python -m benchmarks.generation.prompts                        all, about a quarter of an hour, most of it compiling
    python -m benchmarks.generation.prompts lfm2 --tokens 512      one of them
    python -m benchmarks.generation.prompts --device cuda          and single tokens besides, captured

On a GPU each model has a process of its own: all are compiled, and run once, side by side; then they are timed one
after the other, alone. A model that fails is told, and the others go on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
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
from partitioner.cli.common.tables import print_table
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
    "minimax": {
        **_SIZES, **_ATTENTION, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    },
    "recurrent_gemma": {
        **_SIZES, **_ATTENTION, "head_dim": 32, "lru_width": 256,
        "block_types": ["recurrent", "recurrent", "attention"], "attention_window_size": 4096,
    },
    "rwkv": {**_SIZES, "attention_hidden_size": 256},
    "xlstm": {**_SIZES, "num_blocks": LAYERS, "num_heads": 4, "qk_dim_factor": 1.0},
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


Row = tuple[str, ...]


def row_of(name: str, given: argparse.Namespace, *, say: Callable[[str], None], alone: Callable[[], None]) -> Row:
    """A line of the table. alone: returns when nobody else uses the device."""
    begun = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (1, given.tokens), generator=generator).to(given.device)
    model = build(name).to(given.device)
    parts = partition(model, Plan())
    parts.generation_report  # noqa: B018  compiles
    say(f"{name}: compiled after {time.perf_counter() - begun:.0f} s")
    runner: Any = parts
    if given.device == "cuda":
        runner = parts.engine(0, ThreadGroup(Mesh.of()).communicator(0), device="cuda", cuda_graph=True)
    theirs = ask(model, ids, FOLLOWING)[:, given.tokens :].tolist()
    say(f"{name}: transformers has run after {time.perf_counter() - begun:.0f} s")
    ours = ask(runner, ids, FOLLOWING)[:, given.tokens :].tolist()
    if ours != theirs:
        raise ValueError(f"continues otherwise: {ours}, transformers {theirs}")
    contestants = {
        "ours": lambda: waited(ask(runner, ids, 1, prefill_step=given.prefill_step)),
        "theirs": lambda: waited(ask(model, ids, 1)),
    }
    if given.device == "cuda":
        take_turns(contestants, rounds=1)
    say(f"{name}: run after {time.perf_counter() - begun:.0f} s")
    alone()
    times = take_turns(contestants, rounds=rounds_in(given.seconds, contestants))
    most = parts.generation_report.tokens_at_a_time
    medians = [f"{torch.tensor(times[who]).median().item() * 1e3:.1f}" for who in contestants]
    ratio = str(Ratio.of(times["ours"], times["theirs"]))
    say(f"{name}: {ratio} of {medians[1]} ms")
    if given.device == "cuda":
        say(f"{name}: {single_tokens(runner, model, ids)}")
    for note in parts.generation_report.notes:
        say(f"{name}: {note}")
    return name, *medians, ratio, str(most or "any")


def in_a_process(name: str, given: argparse.Namespace, pipe: Any) -> None:
    """Tells lines, then None and waits for its turn, then its row; an exception in the place of a row that fails."""
    _quiet()

    def alone() -> None:
        pipe.send(None)
        pipe.recv()

    try:
        pipe.send(row_of(name, given, say=pipe.send, alone=alone))
    except Exception as error:  # the others go on
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def side_by_side(given: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    """The rows of all models; see the module's docstring."""
    context, began = multiprocessing.get_context("spawn"), time.perf_counter()
    running: dict[str, Any] = {}
    for name in given.models:
        pipe, theirs = context.Pipe()
        context.Process(target=in_a_process, args=(name, given, theirs), daemon=True).start()
        theirs.close()
        running[name] = pipe
    rows = []

    def heard(name: str, seconds: float) -> bool:
        """Until a process waits for its turn; whether it does, and not of one that is done, or takes longer."""
        while name in running:
            try:
                found = running[name].recv() if running[name].poll(max(0.0, seconds)) else TimeoutError("took too long")
            except EOFError:
                found = RuntimeError("its process ended")
            if found is None:
                return True
            if isinstance(found, str):
                say(found)
                continue
            del running[name]
            if isinstance(found, tuple):
                rows.append(found)
            else:
                say(f"{name} failed: {type(found).__name__}: {found}")
        return False

    ready = [name for name in given.models if heard(name, began + given.compile_within - time.perf_counter())]
    for name in ready:
        running[name].send(None)
        heard(name, given.time_within)
    return rows


def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()


def main() -> None:
    parser = argparse.ArgumentParser(description="A prompt of models that remember states, against transformers.")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--prefill-step", type=int, help="how many tokens ours runs at a time; by default 512")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=20.0, help="per model; at least 5 rounds are run")
    parser.add_argument("--side-by-side", action="store_true", help="compile in processes side by side, as on a GPU")
    parser.add_argument("--compile-within", type=float, default=300.0, help="seconds for all models side by side")
    parser.add_argument("--time-within", type=float, default=120.0, help="seconds for each of them after that")
    given = parser.parse_args()
    _quiet()
    console = Console(width=None if sys.stdout.isatty() else 110)

    def say(line: str) -> None:
        console.print(line, markup=False)

    if given.device == "cuda" or given.side_by_side:
        rows = side_by_side(given, say)
    else:
        rows = [row_of(name, given, say=say, alone=lambda: None) for name in given.models]
    title = f"a prompt of {given.tokens} tokens: ours / transformers"
    table = Table()
    for column in ("model", "ours ms", "transformers ms", "ratio", "at a time"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print_table(title, table)
    if len(rows) < len(given.models):
        sys.exit(1)


if __name__ == "__main__":
    main()
