"""What transformers' GenerationConfig has and `generate` does not: each with what it is, and the values that ask for
nothing, which are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from partitioner.errors import InputError

__all__ = ["NOT_OFFERED", "SAMPLING_ONLY", "refuse_not_offered"]

_ANY = object()
"""Whatever the value, it changes no token by itself."""

NOT_OFFERED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "num_beams": ("beam search", (1,)),
    "num_beam_groups": ("beam search in groups", (1,)),
    "early_stopping": ("when beam search ends", (_ANY,)),
    "length_penalty": ("how beams are scored", (_ANY,)),
    "diversity_penalty": ("how beams are scored", (_ANY,)),
    "constraints": ("constrained beam search", ()),
    "force_words_ids": ("constrained beam search", ()),
    "num_return_sequences": ("several sequences per prompt", (1,)),
    "penalty_alpha": ("contrastive search", (0,)),
    "dola_layers": ("contrasting layers", ()),
    "low_memory": ("contrastive search in steps", (_ANY,)),
    "guidance_scale": ("classifier-free guidance", (1,)),
    "top_h": ("top-H sampling", ()),
    "encoder_repetition_penalty": ("a penalty for what the prompt does not have", (1,)),
    "encoder_no_repeat_ngram_size": ("forbidding n-grams of the prompt", (0,)),
    "remove_invalid_values": ("logits that are not finite are errors", (False,)),
    "exponential_decay_length_penalty": ("a length penalty", ()),
    "sequence_bias": ("biases for sequences", ()),
    "token_healing": ("token healing", (False,)),
    "watermarking_config": ("watermarks", ()),
    "renormalize_logits": ("logits are normalised for logprobs=True", (_ANY,)),
    "max_time": ("a limit in seconds", ()),
    "output_attentions": ("attention weights as outputs", (False,)),
    "output_hidden_states": ("hidden states as outputs", (False,)),
    "output_scores": ("scores as outputs: logprobs=True returns those of the tokens", (False,)),
    "output_logits": ("logits as outputs", (False,)),
    "return_dict_in_generate": ("outputs in a dictionary", (False,)),
    "use_cache": ("whether there is a cache: there always is", (_ANY,)),
    "cache_implementation": (
        "a cache that rounds what it holds", ("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static")
    ),
    "cache_config": ("how a cache rounds what it holds", ()),
    "max_cache_len": ("the size of the cache: see CacheSize", (_ANY,)),
    "prefill_chunk_size": ("see prefill_step", (_ANY,)),
    "bos_token_id": ("the prompt of an empty prompt", (_ANY,)),
    "decoder_start_token_id": ("the prompt of a decoder with an encoder", (_ANY,)),
    "assistant_model": ("assisted generation", ()),
    "is_assistant": ("assisted generation", (False,)),
    "num_assistant_tokens": ("assisted generation", (_ANY,)),
    "num_assistant_tokens_schedule": ("assisted generation", (_ANY,)),
    "assistant_confidence_threshold": ("assisted generation", (_ANY,)),
    "assistant_early_exit": ("assisted generation", ()),
    "assistant_lookbehind": ("assisted generation", (_ANY,)),
    "target_lookbehind": ("assisted generation", (_ANY,)),
    "assistant_ensemble_weight": ("assisted generation", ()),
    "speculation_type": ("assisted generation", (_ANY,)),
    "prompt_lookup_num_tokens": ("prompt lookup", (0,)),
    "max_matching_ngram_size": ("prompt lookup", (_ANY,)),
    "use_mtp": ("drafts by a model's own extra layers", (False,)),
    "compile_config": ("see Engine.connect(compile=True)", (_ANY,)),
    "disable_compile": ("see Engine.connect(compile=True)", (_ANY,)),
    "continuous_batching_config": ("continuous batching", (_ANY,)),
    "logits_processor": ("processors of your own", ([],)),
    "stopping_criteria": ("criteria of your own", ([],)),
    "prefix_allowed_tokens_fn": ("functions of your own", ()),
    "negative_prompt_ids": ("classifier-free guidance", ()),
    "streamer": ("streamers: use stream()", ()),
    "generation_config": ("a GenerationConfig: give its fields as keywords", ()),
    "synced_gpus": ("ranks always run together", (_ANY,)),
    "trust_remote_code": ("code from elsewhere", (False,)),
    "past_key_values": ("a cache of your own", ()),
    "use_model_defaults": ("the model's generation config is obeyed", (True,)),
    "negative_prompt_attention_mask": ("classifier-free guidance", ()),
    "assistant_tokenizer": ("assisted generation", ()),
    "custom_generate": ("code from elsewhere", ()),
    "inputs_embeds": ("embeddings in place of ids", ()),
    "token_type_ids": ("types of tokens: call the tokenizer with return_token_type_ids=False", ()),
    "position_ids": ("positions of your own: they follow from the prompts", ()),
}  # fmt: skip
"""By name: what it is, and the values that change nothing; None never does."""

SAMPLING_ONLY = frozenset(
    ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
)
"""What greedy search does not read."""


def refuse_not_offered(given: Mapping[str, Any], *, of_the_model: bool) -> None:
    """Raises InputError for the first of `given` that asks for something that there is not."""
    for name, value in given.items():
        if name not in NOT_OFFERED or value is None:
            continue
        what, neutral = NOT_OFFERED[name]
        plain = isinstance(value, (int, float, str, list, tuple))
        if any(known is _ANY or (plain and value == known) for known in neutral):
            continue
        if not of_the_model:
            raise InputError(f"generate() does not offer {name!r} ({what})")
        without = repr(neutral[0]) if neutral else "None"
        raise InputError(
            f"the model's generation config asks for {name}={value!r} ({what}), which generate() does not offer: give "
            f"{name}={without} to go on without it"
        )
