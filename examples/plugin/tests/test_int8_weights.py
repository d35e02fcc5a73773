"""The pass against the model's own code with rounded weights, in float64; run it where the plugin is installed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from int8_weights.int8_weights import Int8Weights
from int8_weights.op import int8_linear, make_codes, make_scales
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from partitioner import Plan, PlanError, partition
from partitioner.plugin import check_rule
from runtime.engine.simulator import Simulator

IDS = torch.tensor([[5, 17, 9, 33, 2], [1, 1, 40, 7, 50]])


def tiny(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3,
        vocab_size=67, attention_bias=True, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def rounded(model: Any) -> Any:
    """Every linear's weight as its codes stand for it; a tied table keeps its own."""
    changed = copy.deepcopy(model)
    for module in changed.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(make_codes(module.weight) * make_scales(module.weight)[:, None])
    return changed


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_equals_the_model_with_rounded_weights(tp: int, tied: bool) -> None:
    model = tiny(tied=tied)
    parts = partition(model, Plan(tp=tp, passes=("int8-weights",)))
    found = parts.simulate(input_ids=IDS)
    assert error(found, logits(rounded(model))) < 1e-10
    assert error(found, logits(model)) > 1e-3, "nothing was rounded"
    dtypes = {str(weight.dtype) for weight in parts.rank(0).weights if weight.name.endswith("_codes")}
    assert dtypes == {"torch.int8"}
    parts.rank(tp - 1).graph_module  # noqa: B018 - weights under their names


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_generation_continues_with_the_same_weights(tp: int) -> None:
    model = tiny()
    parts = partition(model, Plan(tp=tp, passes=("int8-weights",)))
    expected = rounded(model).generate(IDS, max_new_tokens=8, do_sample=False, use_cache=False, eos_token_id=None)
    found = parts.generate(IDS, max_new_tokens=8)
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)


def test_some_linears_only() -> None:
    parts = partition(tiny(), Plan(tp=2, passes=[("int8-weights", {"weights": ["*.mlp"]})]))
    codes = [weight.name for weight in parts.rank(0).weights if weight.name.endswith("_codes")]
    assert len(codes) == 6
    assert all(".mlp." in name for name in codes)


def test_weights_that_come_later_are_the_ones_rounded() -> None:
    """Codes are made when a rank is loaded, of what it is given, and not of what the model held when it was traced."""
    model, other = tiny(), tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    parts = partition(model, Plan(tp=2, passes=[Int8Weights()]))
    simulator = Simulator([parts.rank(rank) for rank in range(2)], weights=other.state_dict())
    assert error(simulator(input_ids=IDS)[0], logits(rounded(other))) < 1e-10


def test_codes_are_made_of_what_ranks_read_from_files(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    parts = partition(str(tmp_path), Plan(tp=2, passes=[Int8Weights()]))
    assert error(parts.simulate(input_ids=IDS), logits(rounded(model))) < 1e-10


def test_a_glob_that_selects_nothing() -> None:
    with pytest.raises(PlanError, match=r"'int8-weights'.*'model.embed_tokens' selects no weight that this pass can"):
        partition(tiny(), Plan(passes=[Int8Weights(weights=("model.embed_tokens",))]))


def test_the_rule_is_what_the_op_does() -> None:
    x, weight, bias = (torch.rand(*shape, dtype=torch.float64) for shape in ((2, 3, 8), (6, 8), (6,)))
    check_rule(int8_linear, x, make_codes(weight), make_scales(weight))
    check_rule(int8_linear, x, make_codes(weight), make_scales(weight), bias)
