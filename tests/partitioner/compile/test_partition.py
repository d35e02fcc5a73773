"""What is asked of `partition` in the wrong words is refused in the right ones."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from partitioner import CaptureError, Plan, PlanError, partition
from partitioner.compile.partition import compile_program
from tests.support import handmade, partitioned


@pytest.mark.parametrize("model", [None, torch.nn.Linear(3, 3)], ids=["None", "module"])
def test_a_model_is_one_of_transformers(model: object) -> None:
    with pytest.raises(CaptureError, match=f"cannot capture a {type(model).__name__}: required is a model of transf"):
        partition(model, Plan(tp=2))


@pytest.mark.parametrize("plan", [None, 2, "tp=2"], ids=str)
def test_a_plan_is_a_plan(plan: object) -> None:
    with pytest.raises(PlanError, match=r"must be a Plan, such as Plan\(tp=2\); got"):
        partition(LlamaForCausalLM, plan)  # before anything is traced
    with pytest.raises(PlanError, match=r"must be a Plan, such as Plan\(tp=2\); got"):
        compile_program(handmade.traced(), plan)


@pytest.mark.parametrize(
    ("glob", "near"),
    [
        ("LM_HEAD", "lm_head"),
        ("Model.Norm.weight", "model.norm.weight"),
        ("lm_haed", "lm_head"),
        ("model.layers.*.self_atn.q_proj", r"model.layers.\*.self_attn.q_proj"),
        ("*.q_prj", r"\*.q_proj"),
        ("model.layers.9.mlp", "model.layers.0.mlp"),
        ("lm_head.weight.data", "lm_head.weight$"),
    ],
)
def test_a_glob_that_matches_nothing_names_what_is_near_in_any_case(glob: str, near: str) -> None:
    with pytest.raises(PlanError, match=f"keep_whole='{re.escape(glob)}' matches no weight; near it: .*{near}"):
        partitioned.compiled("llama", 2, keep_whole=(glob,))


class NoEmbeddings(LlamaForCausalLM):
    def get_input_embeddings(self):
        raise NotImplementedError


def test_a_model_that_does_not_tell_its_vocabulary() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    model = NoEmbeddings(LlamaConfig(**sizes, intermediate_size=16, tie_word_embeddings=False))
    with pytest.raises(CaptureError, match=r"NoEmbeddings: .*get_input_embeddings\(\) yields no embedding"):
        partition(model, Plan(tp=2))
