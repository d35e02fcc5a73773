"""From a request to the options of `generate`: OpenAI's defaults, after what the model's generation config says."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from partitioner.serving.openai.errors import invalid
from partitioner.serving.openai.requests import GenerationFields
from runtime.generation.generation_options import Options

__all__ = ["generate_options"]

_DIGITS = 9


def generate_options(
    fields: GenerationFields, own: Mapping[str, Any], *, max_new_tokens: int, top_logprobs: int | None
) -> Options:
    """own: the model's generation config. top_logprobs: how many alternatives of each token; None: no log-probability.

    The temperature is 1 where neither says one, and 0 is greedy search. Without a seed, one is drawn.
    """
    temperature = _first(fields.temperature, own.get("temperature"), 1.0)
    top_k = _first(fields.top_k, own.get("top_k"), 0)
    options: Options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "repetition_penalty": _first(fields.repetition_penalty, own.get("repetition_penalty"), 1.0),
        "seed": secrets.randbits(63) if fields.seed is None else fields.seed % 2**64,
        "stop_strings": None,  # they are looked for where the text is
        "top_logprobs": top_logprobs,
    }
    if temperature > 0:
        options["temperature"] = temperature
        options["top_p"] = _first(fields.top_p, own.get("top_p"), 1.0)
        options["top_k"] = max(top_k, 0)
        options["min_p"] = _first(fields.min_p, own.get("min_p"), None)
    if fields.ignore_eos:
        options["eos_token_id"] = []
    if fields.presence_penalty:
        options["presence_penalty"] = fields.presence_penalty
    if fields.frequency_penalty:
        options["frequency_penalty"] = fields.frequency_penalty
    if fields.logit_bias:
        options["logit_bias"] = _bias(fields.logit_bias)
    return options


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    """By id, which JSON has as text."""
    for token in given:
        if not (token.isascii() and token.isdigit()) or len(token) > _DIGITS:
            raise invalid(f"Invalid key in 'logit_bias': {token[:20]!r}; keys are token ids.", param="logit_bias")
    return {int(token): value for token, value in given.items()}


def _first(*values: Any) -> Any:
    return next((value for value in values[:-1] if value is not None), values[-1])
