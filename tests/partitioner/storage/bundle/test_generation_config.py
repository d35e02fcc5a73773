"""What a model's generation config says goes with its bundle, and with what the bundle becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from partitioner import CaptureError, Plan, load, partition

SAID = {"repetition_penalty": 1.7, "suppress_tokens": [3, 5], "pad_token_id": 11, "max_new_tokens": 6}


def model_that_says(**said: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.6,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(**said)
    return model


def test_it_is_kept(tmp_path: Path) -> None:
    model = model_that_says(**SAID, eos_token_id=[7, 9])
    parts = partition(model, Plan(tp=2))
    assert {**parts.rank(0).generation} == SAID
    prompts = torch.tensor([[5, 4, 6], [8, 1, 2]])
    expected = parts.generate(prompts)
    parts.save(tmp_path / "two")
    assert torch.equal(load(tmp_path / "two").generate(prompts), expected)
    anew = partition(tmp_path / "two", Plan(tp=1))
    assert {**anew.rank(0).generation} == SAID
    assert anew.rank(0).eos_token_id == (7, 9)


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ([7, -1], (7,)),
        (None, ()),
        pytest.param(0, (0,), marks=pytest.mark.slow),
        *(pytest.param(said, (), marks=pytest.mark.slow) for said in (-1, [-1], -100, [])),
    ],
)
def test_what_a_file_says_of_ends_can_be_read_again(said: object, ends: tuple[int, ...], tmp_path: Path) -> None:
    """A negative id is that of no token, as transformers takes it."""
    model = model_that_says(eos_token_id=said, pad_token_id=-1)
    parts = partition(model, Plan(tp=1))
    parts.save(tmp_path / "one")
    found = load(tmp_path / "one")
    assert parts.rank(0).eos_token_id == found.rank(0).eos_token_id == ends
    prompts = torch.tensor([[5, 4, 6]])
    expected = model.generate(prompts, max_new_tokens=4, do_sample=False, eos_token_id=list(ends) or -1, pad_token_id=0)
    assert torch.equal(found.generate(prompts, max_new_tokens=4), expected)


def test_ends_that_no_bundle_could_hold_are_refused_when_they_are_seen() -> None:
    with pytest.raises(CaptureError, match=r"eos_token_id of LlamaForCausalLM's .* at most 62 bits, got \[7, 1180591"):
        partition(model_that_says(eos_token_id=[7, 2**70]), Plan(tp=1))
