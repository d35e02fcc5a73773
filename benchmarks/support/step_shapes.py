"""Decoders whose steps are measured and priced: of published models with few of their layers, and others to fit on.

CASES     what `benchmarks.gpu.plans` holds prices against
FITTED    what `benchmarks.planning.own_steps` fits them on: layers of other widths, as one GPU or a rank has them,
          and thin ones, whose steps are what stands between products: launches, collectives, messages of stages
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.support.decoders import SHAPES

__all__ = ["CASES", "FITTED", "ONE", "Shape", "model_of"]

ONE = "tp=1"
"""All of a model on each GPU, beside the plans: no choice among them."""


@dataclass(frozen=True)
class Shape:
    """layers: that are run. plans: of two ranks."""

    kind: str
    fields: Mapping[str, int]
    layers: int
    plans: Sequence[str] = (ONE,)


CASES = {
    "llama 8b": Shape("llama", SHAPES["8b"], 12, (ONE, "tp=2", "pp=2", "dp=2", "sp=2")),
    "qwen3 32b": Shape("qwen3", {
        "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936,
    }, 6, (ONE, "tp=2", "pp=2", "dp=2")),
    "qwen3 30b-a3b": Shape("qwen3_moe", {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "decoder_sparse_step": 1,
    }, 6, (ONE, "tp=2,ep=2", "tp=2", "dp=2,ep=2", "dp=2")),
    "llama 70b": Shape("llama", SHAPES["70b"], 4, (ONE, "tp=2", "pp=2", "dp=2")),
}  # fmt: skip


def _dense(hidden: int, inner: int, heads: int, kv_heads: int, vocabulary: int = 32000) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 128, "vocab_size": vocabulary,
    }  # fmt: skip


def _experts(hidden: int, inner: int, count: int, chosen: int, heads: int, kv_heads: int) -> dict[str, int]:
    return _dense(hidden, hidden, heads, kv_heads) | {
        "moe_intermediate_size": inner, "num_experts": count, "num_experts_per_tok": chosen, "decoder_sparse_step": 1,
    }  # fmt: skip


FITTED = {
    "dense": Shape("llama", _dense(4096, 12288, 32, 8), 8, (ONE, "tp=2", "pp=2")),
    "dense, shallow": Shape("llama", _dense(4096, 12288, 32, 8), 2),
    "half": Shape("llama", _dense(4096, 6144, 16, 4), 8),
    "large": Shape("llama", _dense(8192, 16384, 32, 4), 4),
    "norms": Shape("qwen3", _dense(4096, 12288, 32, 8), 8),
    "half, norms": Shape("qwen3", _dense(4096, 6144, 16, 4), 8),
    "experts": Shape("qwen3_moe", _experts(2048, 1024, 64, 8, 16, 4), 6),
    "few experts": Shape("qwen3_moe", _experts(4096, 768, 32, 4, 32, 8), 6),
    "thin": Shape("llama", _dense(4096, 256, 4, 2, 512), 4, (ONE, "tp=2", "pp=2", "sp=2")),
    "thin experts": Shape("qwen3_moe", _experts(2048, 64, 16, 8, 4, 2), 4, (ONE, "tp=2,ep=2", "dp=2,ep=2")),
    "thin experts, deep": Shape("qwen3_moe", _experts(2048, 64, 16, 8, 4, 2), 12, ("tp=2,ep=2", "dp=2,ep=2")),
}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 8, "vocab_size": 256,
         "num_experts_per_tok": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}  # fmt: skip


def model_of(
    shape: Shape, positions: int, *, layers: int | None = None, small: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """On the meta device. positions: tokens that it has room for. layers: instead of the shape's. small: as narrow as
    can be.
    """
    fields = {**shape.fields, "num_hidden_layers": layers or shape.layers}
    if small:
        fields |= {name: value for name, value in SMALL.items() if name in fields or name == "head_dim"}
        fields["num_hidden_layers"] = layers or 2
    config = CONFIG_MAPPING[shape.kind](
        **fields, max_position_embeddings=positions, rope_theta=500000.0, attn_implementation="sdpa",
        eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
