"""Keywords of transformers' `generate` at the values at which they change no token: taken, and dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["without_neutral"]

_OFF = (None, False)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # how many sequences
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "early_stopping": _OFF,
    "length_penalty": (None, 0.0, 1.0),
    "diversity_penalty": (None, 0.0),
    "penalty_alpha": (None, 0.0),
    "constraints": (None,),
    "force_words_ids": (None,),
    # how tokens are computed: the same tokens with a cache, with which cache, and without
    "use_cache": (None, True, False),
    "cache_implementation": (None, "dynamic", "static", "offloaded", "offloaded_static"),
    "cache_config": (None,),
    "max_cache_len": (None,),
    "past_key_values": (None,),
    "disable_compile": (None, True, False),
    "compile_config": (None,),
    "low_memory": (None, True, False),
    "synced_gpus": _OFF,
    "use_model_defaults": (None, True),
    # processors at the values that do nothing
    "typical_p": (None, 1.0),
    "top_h": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "renormalize_logits": (None, True, False),
    "remove_invalid_values": _OFF,
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "sequence_bias": (None,),
    "token_healing": _OFF,
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "logits_processor": (None, []),
    "stopping_criteria": (None, []),
    "prefix_allowed_tokens_fn": (None,),
    # lengths
    "max_length": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "max_time": (None,),
    # what is returned besides tokens
    "output_attentions": _OFF,
    "output_hidden_states": _OFF,
    "output_scores": _OFF,
    "output_logits": _OFF,
    "return_dict_in_generate": _OFF,
    # other ways to generate, not asked for
    "assistant_model": (None,),
    "assistant_tokenizer": (None,),
    "prompt_lookup_num_tokens": (None,),
    "use_mtp": _OFF,
    "streamer": (None,),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "generation_config": (None,),
    "custom_generate": (None,),
    "inputs_embeds": (None,),
    "token_type_ids": (None,),
    "position_ids": (None,),
}


def without_neutral(options: Mapping[str, Any], offered: set[str]) -> dict[str, Any]:
    """`options` less those that ask for what is done anyway; what is `offered` here is left to its own checks."""
    return {name: value for name, value in options.items() if name in offered or not _is_neutral(name, value)}


def _is_neutral(name: str, value: Any) -> bool:
    # True is not 1 here, nor is a tensor compared
    return any(
        value is same or (type(value) in (int, float, str, list) and type(same) is not bool and value == same)
        for same in _NEUTRAL.get(name, ())
    )
