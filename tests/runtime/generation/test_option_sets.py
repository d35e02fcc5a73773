"""Random sets of all that transformers' GenerationConfig has: its tokens, or a refusal that names the option."""

from __future__ import annotations

import contextlib
import functools
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from partitioner import Parts, Plan, partition
from partitioner.errors import InputError, SamplingError
from runtime.generation.generation_options import Settings
from runtime.generation.not_offered import NOT_OFFERED

VOCABULARY = 23
PROMPTS = torch.tensor([[5, 3, 7, 5, 3], [2, 9, 9, 4, 6]])
Draw = Callable[[random.Random], Any]


@functools.cache
def _model() -> tuple[PreTrainedModel, Parts[Any]]:
    """Few tokens and a small vocabulary, so that every rule comes to speak: texts that repeat themselves."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.6, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    return model, partition(model, Plan(tp=2))


def _ids(count: int) -> Draw:
    return lambda chosen: chosen.sample(range(VOCABULARY), chosen.randint(1, count))


OFFERED: dict[str, Draw] = {
    "max_new_tokens": lambda chosen: chosen.randint(1, 12),
    "max_length": lambda chosen: chosen.randint(6, 17),
    "min_new_tokens": lambda chosen: chosen.randint(0, 9),
    "min_length": lambda chosen: chosen.randint(0, 13),
    "do_sample": lambda chosen: False,
    "repetition_penalty": lambda chosen: chosen.choice([1.0, 1.3, 0.8, 2.5]),
    "no_repeat_ngram_size": lambda chosen: chosen.randint(0, 4),
    "bad_words_ids": lambda chosen: [_ids(2)(chosen) for _ in range(chosen.randint(1, 5))],
    "suppress_tokens": _ids(5),
    "begin_suppress_tokens": _ids(5),
    "forced_bos_token_id": lambda chosen: chosen.randrange(VOCABULARY),
    "forced_eos_token_id": lambda chosen: chosen.choice([chosen.randrange(VOCABULARY), _ids(2)(chosen)]),
    "eos_token_id": lambda chosen: chosen.choice([chosen.randrange(VOCABULARY), _ids(6)(chosen)]),
    "pad_token_id": lambda chosen: chosen.randrange(VOCABULARY),
}
OTHERS: dict[str, Draw] = {
    "num_beams": lambda chosen: chosen.choice([1, 1, 3]),
    "num_return_sequences": lambda chosen: 1,
    "early_stopping": lambda chosen: chosen.random() < 0.5,
    "length_penalty": lambda chosen: chosen.choice([1.0, 0.5]),
    "use_cache": lambda chosen: chosen.random() < 0.8,
    "cache_implementation": lambda chosen: chosen.choice([None, "dynamic", "static"]),
    "guidance_scale": lambda chosen: chosen.choice([1.0, 1.0, 1.5]),
    "encoder_repetition_penalty": lambda chosen: chosen.choice([1.0, 1.2]),
    "encoder_no_repeat_ngram_size": lambda chosen: chosen.choice([0, 2]),
    "remove_invalid_values": lambda chosen: chosen.random() < 0.3,
    "exponential_decay_length_penalty": lambda chosen: chosen.choice([None, (2, 1.5)]),
    "sequence_bias": lambda chosen: chosen.choice([None, [[[3], 2.0]]]),
    "renormalize_logits": lambda chosen: chosen.random() < 0.5,
    "token_healing": lambda chosen: False,
    "output_scores": lambda chosen: chosen.random() < 0.3,
    "return_dict_in_generate": lambda chosen: chosen.random() < 0.3,
    "bos_token_id": lambda chosen: 1,
    "decoder_start_token_id": lambda chosen: 1,
    "num_assistant_tokens": lambda chosen: 5,
    "prompt_lookup_num_tokens": lambda chosen: chosen.choice([None, None, 3]),
    "penalty_alpha": lambda chosen: chosen.choice([None, 0.6]),
    "dola_layers": lambda chosen: chosen.choice([None, "low"]),
    "diversity_penalty": lambda chosen: 0.0,
    "num_beam_groups": lambda chosen: 1,
    "max_time": lambda chosen: chosen.choice([None, 30.0]),
    "low_memory": lambda chosen: False,
    "prefill_chunk_size": lambda chosen: chosen.choice([None, 2]),
    "disable_compile": lambda chosen: True,
}
"""Their values that ask for nothing most often, so that sets with several of them still run."""


def option_set(seed: int) -> dict[str, Any]:
    chosen = random.Random(seed)
    found = {name: OFFERED[name](chosen) for name in chosen.sample(sorted(OFFERED), chosen.randint(1, 6))}
    for name in chosen.sample(sorted(OTHERS), chosen.randint(0, 4)):
        found[name] = OTHERS[name](chosen)
    return found


def _is_no_option_set(options: dict[str, Any]) -> bool:
    """Whether transformers itself refuses it: what is forced must not be suppressed."""
    forced = options.get("forced_bos_token_id"), options.get("forced_eos_token_id")
    each = [token for given in forced if given is not None for token in (given if isinstance(given, list) else [given])]
    return bool({*each} & {*options.get("suppress_tokens", ())})


def compare(options: dict[str, Any]) -> str:
    """ "equal", or the refusal; raises AssertionError for other tokens than transformers'."""
    model, parts = _model()
    try:
        found = parts.generate(PROMPTS, **options)
    except (InputError, SamplingError) as error:
        return str(error)
    expected = _transformers(model, **options)
    assert torch.equal(found, expected), (options, found.tolist(), expected.tolist())
    return "equal"


def _transformers(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: torch.Tensor = model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **options)
    return found


def _may_be_refused(options: dict[str, Any], said: str) -> bool:
    """By the name of an option that was given and is not offered; or where the rules leave no token at all."""
    named = re.match(r"generate\(\) does not offer '(\w+)'", said)
    if named is not None:
        return named[1] in options and named[1] in NOT_OFFERED
    none_left = re.match(r"([\w, ]+) together leave no token for row \d, new token \d+$", said)
    return none_left is not None and set(none_left[1].split(", ")) <= {*options, "eos_token_id"}


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (50, 100, 150))])
def test_transformers_tokens_or_a_refusal_by_name(first: int) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + 50):
        options = option_set(seed)
        if _is_no_option_set(options):
            continue
        said = compare(options)
        assert said == "equal" or _may_be_refused(options, said), (options, said)
        outcomes["equal" if said == "equal" else "refused"] += 1
    assert outcomes["equal"] > 20
    assert outcomes["refused"] > 2


def test_every_field_is_offered_or_named() -> None:
    """A field that a newer transformers brings is noticed here."""
    names = set(vars(GenerationConfig())) - {"transformers_version", "_from_model_config"}
    for name in names - NOT_OFFERED.keys():
        with pytest.raises((InputError, SamplingError, TypeError), match=name):
            Settings.of({name: object()}, eos_token_id=())
    for name in NOT_OFFERED:
        with contextlib.suppress(InputError):  # where the value asks for something
            Settings.of({name: object()}, eos_token_id=())


def test_the_models_own_config_is_obeyed_or_named() -> None:
    model, _ = _model()
    before = model.generation_config
    plain = _transformers(model)
    try:
        for said in (
            {"repetition_penalty": 1.6, "suppress_tokens": [3, 5, 7], "forced_eos_token_id": 8, "max_length": 14},
            {"no_repeat_ngram_size": 2, "eos_token_id": [9, 4, 12], "pad_token_id": 11},
            {"max_new_tokens": 9, "bad_words_ids": [[2], [12, 20]], "temperature": 0.0, "top_p": 0.4},
        ):
            model.generation_config = GenerationConfig(**said)
            expected = _transformers(model)
            assert not torch.equal(expected[:, :10], plain[:, :10]), said
            assert torch.equal(partition(model, Plan(tp=2)).generate(PROMPTS), expected), said
        model.generation_config = GenerationConfig(num_beams=4, repetition_penalty=1.3)
        parts = partition(model, Plan(tp=2))
        with pytest.raises(InputError, match=r"config asks for num_beams=4 \(beam search\).*give num_beams=1"):
            parts.generate(PROMPTS)
        assert torch.equal(parts.generate(PROMPTS, num_beams=1), _transformers(model, num_beams=1))
    finally:
        model.generation_config = before


def test_what_a_config_says_of_sampling_alone_is_left_out_of_greedy_search() -> None:
    model = {"temperature": 0.0, "top_p": 7, "pad_token_id": -1, "max_length": 4}
    settings = Settings.of({"max_new_tokens": 3}, eos_token_id=(9,), model=model, width=5)
    assert (settings.max_new_tokens, settings.pad_token_id, settings.sampling.temperature) == (3, 9, 1.0)
    with pytest.raises(SamplingError, match="temperature"):
        Settings.of({"max_new_tokens": 3, "do_sample": True}, eos_token_id=(), model=model)
    with pytest.raises(InputError, match=r"max_length must be .* above the 5 that the prompts have; got 4"):
        Settings.of({}, eos_token_id=(), model=model, width=5)
