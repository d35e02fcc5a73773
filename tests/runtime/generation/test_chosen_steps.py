"""Steps that choose their tokens themselves write what steps write whose tokens the host chooses.

What a GPU captures runs here as it is, step by step: the same ops in the same order on the same tensors.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from runtime.generation.decode_graphs.decoder import Chosen, Decoder
from runtime.generation.generate_loop import GenerateLoop
from runtime.generation.token_rules import TokenRules
from runtime.sampling import row_sampler
from tests.support import stepping
from tests.support.generated import prompts
from tests.support.partitioned import compiled_once

OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4, "logprobs": True},
    {"do_sample": True, "seed": 3, "logprobs": True},
    {"do_sample": True, "top_k": 0, "temperature": 1.3, "request_ids": [4, 9, 2]},
    {"do_sample": True, "top_k": 0, "top_p": 0.8, "seed": 2**63 + 5},
    {"do_sample": True, "top_k": 12, "min_p": 0.02, "typical_p": 0.9, "logprobs": True},
    {"do_sample": True, "presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {5: 3.0}},
    {"suppress_tokens": [3, 4, 5], "bad_words_ids": [[7]], "frequency_penalty": 2.0},
]
IN_PARTS = [OPTIONS[1], OPTIONS[4], OPTIONS[5]]
"""What asks of ranks that hold parts of a vocabulary more than their likeliest tokens."""


class Steps:
    """Has all generation choose in steps; counts those that did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        chosen = Decoder._chosen

        def counted(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return chosen(decoder, *args, **kwargs)

        self._patch = monkeypatch
        monkeypatch.setattr(Decoder, "_chosen", counted)

    def __enter__(self) -> Steps:
        self._context = self._patch.context()
        inner = self._context.__enter__()
        inner.setattr(GenerateLoop, "_chooses_in_steps", lambda loop, settings: not settings.rules.on_host)
        return self

    def __exit__(self, *given: Any) -> None:
        self._context.__exit__(*given)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def said(parts: Any, texts: Any, count: int = 12, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    found = parts.generate(texts, max_new_tokens=count, **{"eos_token_id": [], **options})
    return (found.sequences, found.logprobs) if options.get("logprobs") else (found, None)


@pytest.mark.parametrize(
    ("tp", "options"),
    [
        pytest.param(tp, options, marks=() if tp == 1 or options in IN_PARTS else pytest.mark.slow)
        for options in OPTIONS
        for tp in (1, 3)
    ],
)
def test_the_same_texts(steps: Steps, tp: int, options: dict[str, Any]) -> None:
    parts, texts = compiled_once("llama", tp), prompts("llama", (4, 1, 7))
    expected, scores = said(parts, texts, **options)
    assert steps.count == 0
    with steps:
        found, ours = said(parts, texts, **options)
        assert steps.count == tp * 11
        assert torch.equal(found, expected)
        if scores is not None:
            assert ours is not None
            assert torch.allclose(ours, scores, atol=1e-9, rtol=0)
        # texts that end at different steps
        ends = [int(expected[0, -8]), int(expected[1, -4])]
        with_ends = said(parts, texts, eos_token_id=ends, **options)[0]
    assert torch.equal(with_ends, said(parts, texts, eos_token_id=ends, **options)[0])


def test_what_is_not_certain_is_asked_of_the_host(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, texts = compiled_once("llama", 2), prompts("llama", (4, 1, 7))
    options = {"do_sample": True, "top_k": 0, "top_p": 0.9, "seed": 8, "temperature": 1.5}
    expected, _ = said(parts, texts, **options)
    monkeypatch.setattr(row_sampler, "_LOOK", 4)
    monkeypatch.setattr(row_sampler, "_LEAST", 2)
    begun, uncertain = [], []
    chain = Decoder.chain

    def watched(decoder: Decoder, *args: Any) -> Any:
        begun.append(args)
        for each in chain(decoder, *args):
            uncertain.append(not each.said[2].all())
            yield each

    monkeypatch.setattr(Decoder, "chain", watched)
    with steps:
        assert torch.equal(said(parts, texts, **options)[0], expected)
    assert any(uncertain)
    assert len(begun) > 2
    # those that are taken for certain would have been other tokens
    monkeypatch.setattr(
        Decoder, "chain", lambda *args: (Chosen(_sure(each.said), each.logits) for each in chain(*args))
    )
    with steps:
        assert not torch.equal(said(parts, texts, **options)[0], expected)


def _sure(told: torch.Tensor) -> torch.Tensor:
    told = told.clone()
    told[2] = 1
    return told


def test_a_model_with_states_looks_at_all_of_the_vocabulary(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, texts = stepping.compiled("mamba2", 2), [[5, 6, 7, 8], [9], [3, 4, 5, 6, 7, 8, 9]]
    monkeypatch.setattr(row_sampler, "_LOOK", 4)
    monkeypatch.setattr(row_sampler, "_LEAST", 2)
    monkeypatch.setattr(row_sampler, "_SPARE", 0)
    for options in ({"top_k": 0, "top_p": 0.9}, {"top_k": 3}):
        expected, _ = said(parts, texts, do_sample=True, **options)
        with steps:
            assert torch.equal(said(parts, texts, do_sample=True, **options)[0], expected)
    assert steps.count == 2 * 2 * 11


def test_few_kinds_of_steps_serve_all_that_is_asked(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, texts = compiled_once("llama", 1), prompts("llama", (4, 7, 2))
    more: list[dict[str, Any]] = [{"do_sample": True, "top_k": 5 * number} for number in range(1, 12)]
    asked = [*OPTIONS, *more]
    expected = [said(parts, texts, 5, **options)[0] for options in asked]
    decoders: list[Decoder] = []
    kind_for = Decoder._kind_for

    def watched(decoder: Decoder, kind: Any) -> Any:
        decoders.append(decoder)
        return kind_for(decoder, kind)

    monkeypatch.setattr(Decoder, "_kind_for", watched)
    with steps:
        for _ in range(2):
            for options, wanted in zip(asked, expected, strict=True):
                assert torch.equal(said(parts, texts, 5, **options)[0], wanted)
    (decoder,) = set(decoders)
    assert 4 < len(decoder._kinds) < 9
    assert len(set(decoder._kinds)) == len(decoder._kinds)


def test_rules_that_the_host_applies_are_told(caplog: pytest.LogCaptureFixture) -> None:
    rules = [
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"bad_words_ids": ((1, 2), (3,))}, "bad_words_ids"),
        ({"min_new_tokens": 2}, "min_new_tokens"),
        ({"bad_words_ids": ((3,),), "suppress_tokens": (4,), "logit_bias": ((1, 1.0),)}, ""),
    ]
    for given, name in rules:
        assert TokenRules(**given).on_host == name
    engine = compiled_once("llama", 1)
    with caplog.at_level(logging.WARNING, "partitioner"):
        said(engine, prompts("llama", (4,)), 3, no_repeat_ngram_size=2)
    assert not caplog.records  # nobody asked for captured steps
