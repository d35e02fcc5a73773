"""Grouped heads that a model repeats by broadcasting: they split, and texts are continued."""

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM

from partitioner import Plan, partition


@pytest.mark.parametrize("tp", [2, 3])
def test_groups_repeated_by_broadcasting(tp: int) -> None:
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_kv_heads=3, bias=True,
        new_decoder_architecture=True, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = FalconForCausalLM(config).double().eval()
    ids = torch.tensor([[5, 6, 9, 20]])
    parts = partition(model, Plan(tp=tp))
    torch.testing.assert_close(parts.simulate(input_ids=ids), model(ids).logits, rtol=1e-10, atol=1e-10)
    assert torch.equal(parts.generate(ids, max_new_tokens=12), model.generate(ids, max_new_tokens=12, do_sample=False))
