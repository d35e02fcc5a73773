"""Many requests over stages that remember unlike things: all cut prompts alike, and agree on who shares a prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partitioner import Plan, RankMismatch, partition
from runtime.generation.batching import own_batches
from runtime.kv_cache.cache_size import CacheSize
from tests.runtime.generation.batching.many_requests import Case, assert_as_alone, on_all_ranks
from tests.support import reference, zoo

PREFIX = [3 + number % 50 for number in range(9)]
CASES = [
    Case(PREFIX[:start] + [60 + start] * more, {"max_new_tokens": 3, "eos_token_id": []}, arrival=start % 3)
    for start, more in ((0, 1), (0, 11), (0, 4), (9, 2), (9, 5))
]
SIZE = CacheSize(max_batch=4, max_length=24, prefill_step=7)


def continued(model: Any) -> list[list[int]]:
    """By the model's own code, without a cache."""
    found = []
    for case in CASES:
        text = list(case.prompt)
        for _ in range(case.options["max_new_tokens"]):
            text.append(int(reference.forward(model, input_ids=torch.tensor([text]))[0, -1].argmax()))
        found.append(text[len(case.prompt) :])
    return found


@pytest.mark.parametrize(
    ("plan", "layers"),
    [
        pytest.param("sp=2,pp=2", 2, id="tokens shared out", marks=pytest.mark.slow),
        pytest.param("sp=2,pp=2", 1, id="tokens shared out, and a stage without attention"),
    ],
)
def test_prompts_and_single_tokens_cross_in_their_own_ways(plan: str, layers: int) -> None:
    model, _ = zoo.tiny("llama", num_hidden_layers=layers)
    _assert_right(model, plan)


@pytest.mark.slow
def test_states_per_sequence_on_some_stages_only() -> None:
    layers = {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
    model, _ = zoo.tiny("jamba", **layers)
    _assert_right(model, "pp=2")


def test_a_stage_of_dense_layers_runs_what_those_with_experts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that gather tokens take as many of each rank of dp: the stage before them fills its rows up as well."""
    model, _ = zoo.tiny("qwen3_moe", mlp_only_layers=[0])
    parts = partition(model, Plan.parse("pp=2,ep=2,expert-parallel.exchange=gather"))
    assert_as_alone(CASES, on_all_ranks(parts, CASES, SIZE, block_size=4), continued(model))
    # the control: each stage goes by what it has itself
    monkeypatch.setattr(own_batches, "all_stages", lambda said, *_: said)
    with pytest.raises(RankMismatch):
        on_all_ranks(parts, CASES, SIZE, block_size=4)


def _assert_right(model: Any, plan: str) -> None:
    parts, expected = partition(model, Plan.parse(plan)), continued(model)
    assert_as_alone(CASES, on_all_ranks(parts, CASES, SIZE, block_size=4), expected)
    written = parts.generate([case.prompt for case in CASES], max_new_tokens=3, eos_token_id=[], prefill_step=7)
    assert written[:, -3:].tolist() == expected
