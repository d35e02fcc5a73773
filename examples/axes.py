"""Every axis of parallelism alone, and all together, on one small mixture of experts: all ranks in this process.

    tp    columns and rows of weights, heads        pp    layers, as stages
    sp    tokens of a sequence, and the cache       ep    experts

`make demo` runs it after the two real models. Weights are random, in float64, so that what is left of a difference is
rounding: the logits of a whole text and the tokens written after it are compared with plain transformers.
"""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.table import Table
from transformers import MixtralConfig, MixtralForCausalLM

from partitioner import Plan, partition

PLANS = ("tp=3", "pp=2", "sp=2", "ep=2", "tp=2,ep=4,dp=2", "pp=2,sp=2,tp=2,ep=4")
TOLERANCE = 1e-12  # float64, relative to the largest magnitude
LENGTH, NUM_WRITTEN = 11, 8


def mixture_of_experts() -> MixtralForCausalLM:
    """Sizes that nothing divides evenly: 7 experts, 6 query heads over 2 kv heads, 3 layers, 131 tokens."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=48, intermediate_size=50, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        num_local_experts=7, num_experts_per_tok=2, vocab_size=131, max_position_embeddings=64,
    )  # fmt: skip
    model = MixtralForCausalLM(config).double().eval()
    model.set_experts_implementation("eager")  # transformers' grouped products have no float64
    return model


def compare_axes(console: Console) -> bool:
    """Prints a row per plan; whether all agree with transformers."""
    model = mixture_of_experts()
    ids = torch.randint(131, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        written = model.generate(ids, max_new_tokens=NUM_WRITTEN, do_sample=False, eos_token_id=None, pad_token_id=0)
    table = Table(
        title="one model, every axis: MixtralForCausalLM, float64, ranks in one process", title_justify="left"
    )
    for heading in ("plan", "ranks", "kB of weights per rank", "difference", "same tokens"):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    table.add_row("transformers", "1", f"{sum(p.nbytes for p in model.parameters()) / 1e3:.0f}", "", "")
    equal = True
    for text in PLANS:
        parts = partition(model, Plan.parse(text))
        found = parts.simulate(input_ids=ids)
        worst = ((found - logits).abs().max() / logits.abs().max()).item()
        tokens = parts.generate(ids, max_new_tokens=NUM_WRITTEN, eos_token_id=None)
        same = isinstance(tokens, torch.Tensor) and torch.equal(tokens, written)
        held = [count / 1e3 for count in parts.report.bytes_per_rank]
        table.add_row(
            text, str(Plan.parse(text).mesh.world_size), f"{min(held):.0f} to {max(held):.0f}", f"{worst:.1e}",
            "yes" if same else "NO",
        )  # fmt: skip
        equal &= same and worst <= TOLERANCE
    console.print(table)
    return equal


if __name__ == "__main__":
    if not compare_axes(Console()):
        sys.exit("a plan differs from the original model")
