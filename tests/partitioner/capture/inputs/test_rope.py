"""Rotary embeddings that change with the length are fixed, by the module's own rule, for the longest sequence."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from partitioner.capture import capture
from partitioner.sharding.mesh import Mesh
from tests.supported_models.capture_survey import difference

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.1] * 8,
    "long_factor": [3.3] * 8,
}


def model(rope: dict[str, object]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=32, rope_parameters=rope)
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize(
    ("rope", "max_length", "length"), [(DYNAMIC, None, 20), (DYNAMIC, 40, 40), (LONG, None, 12), (LONG, 40, 40)]
)
def test_fixed_for_the_longest(rope: dict[str, object], max_length: int | None, length: int) -> None:
    original = model(rope)
    before = {name: value.clone() for name, value in original.named_buffers()}
    program = capture(original, mesh=Mesh.of(), max_length=max_length)
    assert all(torch.equal(value, before[name]) for name, value in original.named_buffers())
    ids = torch.randint(3, 64, (2, length))
    assert difference(original, program, ids) < 1e-10
    limit = max_length or (16 if rope is LONG else 32)
    kind = rope["rope_type"]
    assert program.notes == [f"RoPE {kind!r} of model.rotary_emb is fixed for sequences of up to {limit} tokens"]


def test_another_length_has_other_frequencies() -> None:
    original = model(DYNAMIC)
    program = capture(original, mesh=Mesh.of(), max_length=64)
    assert difference(original, program, torch.randint(3, 64, (2, 40))) > 1e-6


def test_computed_on_meta_as_well() -> None:
    with torch.device("meta"):
        empty = model(LONG)
    name = "model.rotary_emb.inv_freq"
    values = capture(empty, mesh=Mesh.of(), max_length=40).weight_data
    assert torch.equal(values[name], capture(model(LONG), mesh=Mesh.of(), max_length=40).weight_data[name])
