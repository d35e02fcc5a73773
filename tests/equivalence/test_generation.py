"""Generation with a cache against the model's own forward without one, and that a fault in the cache is noticed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch import Tensor

import runtime.kv_cache.slots
from partitioner import Plan
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import InputError
from partitioner.proof.float64 import in_float64
from runtime.kv_cache.cache import Cache
from runtime.processes.launch import launch
from tests.support import partitioned, zoo
from tests.supported_models import generation as generating

SAMPLE = ("llama", "gpt2", "gemma2", "gpt_oss", "deepseek_v3", "mixtral")
"""Grouped heads; a table of positions; windows of 8 and soft-caps; sinks; latent attention; experts."""
QUICK = ("gemma2", "mixtral")  # each at tp=3; further ones, by every way of a cache, in tests/passes/test_kv_cache.py


FEW = 12
"""New tokens behind prompts of up to 40: more than a window of 8, so that a cache of windows begins anew."""


def compare(name: str, *, new: int = FEW, **options: Any) -> dict[str, Any]:
    return generating.compare_generation(*partitioned.traced(name), new=new, **options)


@pytest.mark.parametrize(
    ("name", "new"),
    [
        pytest.param(name, new, marks=() if name in QUICK and new == FEW else pytest.mark.slow)
        for name in SAMPLE
        for new in (FEW, generating.NEW)
    ],
)
def test_generates_what_the_model_would(name: str, new: int) -> None:
    plans = generating.PLANS if new == generating.NEW else (generating.ALONE, "tp=3")
    found = compare(name, new=new, plans=plans)
    assert found["verdict"] == "equal", found
    assert found["tokens"] == new
    assert 0 < found["logprob_error"] < 1e-12


def test_a_window_that_is_one_too_wide_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = runtime.kv_cache.slots.allowed

    def wider(*positions: Tensor, window: int | None = None, **options: Any) -> Tensor:
        return right(*positions, window=None if window is None else window + 1, **options)

    monkeypatch.setattr(runtime.kv_cache.slots, "allowed", wider)
    found = compare("gemma2", plans=[generating.ALONE])
    assert found["verdict"] == "wrong"
    assert "tp=1, greedy, prompt of" in found["why"]
    assert compare("gpt2", plans=[generating.ALONE])["verdict"] == "equal"  # has no window


def test_keys_that_are_not_kept_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Cache._attend

    def forgetful(self: Cache, state: str, *tensors: Any) -> Tensor:
        out = attend(self, state, *tensors)
        assert self._batch is not None
        if self._batch.start is None and self._batch.positions.shape[1] == 1:
            keys = self.buffers[f"{state}.key"]
            keys[:, :, int(self._batch.positions[0, 0]) % keys.shape[2]] = 0
        return out

    monkeypatch.setattr(Cache, "_attend", forgetful)
    found = compare("llama", plans=[generating.ALONE])
    assert found["verdict"] == "wrong"
    assert "greedy, prompt of 1: " in found["why"]


def test_one_wrong_log_probability_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = generating.generate

    def off(*given: Any, **options: Any) -> Any:
        found = generate(*given, **options)
        found.logprobs[2, 7] += 1e-6
        return found

    monkeypatch.setattr(generating, "generate", off)
    found = compare("gpt2")
    assert found["verdict"] == "wrong"
    assert found["why"] == "tp=1, greedy, prompt of 11: the log-probability of new token 7 is off by 1.0e-06"


def test_an_encoder_is_refused_with_the_reason() -> None:
    found = compare("masked:bert")
    assert found["verdict"] == "refused"
    assert "is not causal: each token sees those after it" in found["why"]


def test_a_text_becomes_no_longer_than_the_graph_is_right_for() -> None:
    model, program = partitioned.traced("llama")
    short = dataclasses.replace(program, limits={"sequence": (1, 60)})
    parts = compile_program(short, Plan(tp=2))
    assert parts.generate([[3] * 40], max_new_tokens=21).shape == (1, 61)
    with pytest.raises(InputError, match="make up to 61, but this model was compiled for up to 60"):
        parts.generate([[3] * 40], max_new_tokens=22)
    found = generating.compare_generation(model, short, plans=[generating.ALONE])
    assert (found["verdict"], found["tokens"]) == ("equal", 21)


@pytest.mark.slow
def test_where_the_model_itself_does_something_else_for_longer_texts() -> None:
    # from 128 tokens on, its attention also reads a summary of every 128
    parts = partitioned.compiled("deepseek_v4", 2)
    with pytest.raises(InputError, match="compiled for up to 127"):
        parts.generate([[3] * 100], max_new_tokens=64)


def test_fewer_tokens_where_positions_end() -> None:
    model = zoo.tiny("gpt2", n_positions=60)[0]
    found = generating.compare_generation(model, in_float64(trace(model)), plans=[generating.ALONE])
    assert (found["verdict"], found["tokens"]) == ("equal", 21)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("names", "num_ranks"),
    [
        pytest.param(["llama"], 2, marks=pytest.mark.slow),
        pytest.param(
            [
                "gemma2",
                "gpt_oss",
                "gpt2",
                "bloom",
                "gptj",
                "falcon",
                "phi3",
                "mixtral",
                "deepseek_v3",
                "mamba2",
                "lfm2_moe",
                "qwen3_moe",
            ],
            2,
            marks=pytest.mark.slow,
        ),
        pytest.param(["llama", "mistral", "bloom"], 3, marks=pytest.mark.slow),
    ],
    ids=["one", "twelve more", "three ranks"],
)
def test_processes_over_gloo(
    names: list[str], num_ranks: int, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.equivalence.ranks.generating_rank", *names], num_ranks=num_ranks, timeout_s=600)
