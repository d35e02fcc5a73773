"""What a model's generation config says goes with its bundle, and with what the bundle becomes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from partitioner import Plan, load, partition

SAID = {"repetition_penalty": 1.7, "suppress_tokens": [3, 5], "pad_token_id": 11, "max_new_tokens": 6}


def test_it_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.6,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(**SAID, eos_token_id=[7, 9])
    parts = partition(model, Plan(tp=2))
    assert {**parts.rank(0).generation} == SAID
    prompts = torch.tensor([[5, 4, 6], [8, 1, 2]])
    expected = parts.generate(prompts)
    parts.save(tmp_path / "two")
    assert torch.equal(load(tmp_path / "two").generate(prompts), expected)
    anew = partition(tmp_path / "two", Plan(tp=1))
    assert {**anew.rank(0).generation} == SAID
    assert anew.rank(0).eos_token_id == (7, 9)
