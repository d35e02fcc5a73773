"""Weights have one name each, and values where no checkpoint holds them."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from partitioner.capture.trace.weight_names import ModelWeights, check_constant
from partitioner.errors import CaptureError, WeightError
from tests.support import zoo


def on_meta() -> GPT2LMHeadModel:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))


def test_names() -> None:
    weights = ModelWeights(on_meta())
    assert weights.canonical["lm_head.weight"] == "transformer.wte.weight"
    assert weights.aliases["transformer.wte.weight"] == ("lm_head.weight",)
    assert weights.source("transformer.wte.weight") == "checkpoint"


@pytest.mark.parametrize("name", ["llama", "masked:bert", "gemma3_text", "deepseek_v3"])
def test_computed_values_are_those_of_a_real_model(name: str) -> None:
    model, _ = zoo.tiny(name)
    with torch.device("meta"):
        empty = type(model)(model.config).to(model.dtype)
    real, recomputed = ModelWeights(model), ModelWeights(empty)
    assert real.computed
    names = sorted(recomputed.computed)
    for key, value in recomputed.data(names).items():
        assert torch.equal(value, real.data(names)[key])


def test_a_buffer_that_nobody_initialises_is_an_error() -> None:
    model = on_meta()
    model.transformer.h[0].register_buffer("secret", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(WeightError, match=r"cannot compute 'transformer\.h\.0\.secret'"):
        ModelWeights(model).data(["transformer.h.0.secret"])


def test_a_constant_without_a_value_is_an_error() -> None:
    check_constant("constants.x", torch.zeros(2))
    with pytest.raises(CaptureError, match=r"constants\.x"):
        check_constant("constants.x", torch.zeros(2, device="meta"))


def test_the_model_is_only_read() -> None:
    model = on_meta()
    before = dict(model.named_buffers()), [dict(vars(module)) for module in model.modules()]
    weights = ModelWeights(model)
    weights.data(sorted(weights.computed))
    assert dict(model.named_buffers()) == before[0]
    assert all(
        isinstance(module, nn.Module) and vars(module) == was
        for module, was in zip(model.modules(), before[1], strict=True)
    )
