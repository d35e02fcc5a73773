"""Every causal language model of transformers (and the masked ones, as encoders), built tiny from its config class.

    zoo.names()            "llama", "gpt2", ..., "masked:bert", ...
    zoo.tiny(name)         (model, input_ids): float64, seeded, no weight trivially 0 or 1
    zoo.odd(name)          the same with sizes that divide by little: 6 heads over 3, FFN 100, vocabulary 127
    zoo.default_on_meta    the default configuration on the meta device

Sizes are set by field name on whichever fields a config has (`SIZES`); `OVERRIDES` holds what single models need
beyond that. Run as a program, `python -m tests.support.zoo survey [names]` captures each and compares the graph with
the model.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

VOCABULARY, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 128, 64, 96, 2, 4, 2, 16, 4
WINDOW = 8

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "unpadded_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(
        (
            "hidden_size",
            "n_embd",
            "d_model",
            "dim",
            "embedding_size",
            "emb_dim",
            "word_embed_proj_dim",
            "lru_width",
            "attention_hidden_size",
            "input_embedding_size",
            "output_embedding_size",
        ),
        HIDDEN,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "n_inner",
            "dff",
            "ffn_hidden_size",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "hidden_dim",
            "d_inner",
            "feed_forward_size",
            "dense_intermediate_size",
            "intermediate_size_mlp",
        ),
        FFN,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
            "num_encoder_layers",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_decoder_attention_heads",
            "num_encoder_attention_heads",
            "swa_num_attention_heads",
            "attention_heads",
            "linear_num_heads",
            "linear_num_value_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "num_kv_heads"), KV_HEADS
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "swa_head_dim",
            "v_head_dim",
            "qk_nope_head_dim",
            "index_head_dim",
            "linear_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "global_head_dim",
            "kv_channels",
            "d_head",
            "hidden_size_per_layer_input",
        ),
        HEAD_DIM,
    ),
    # with few, their rectified scores tie at 0, and which of equals is chosen is nobody's promise
    "index_n_heads": 24,
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "moe_latent_size",
            "shared_experts_intermediate_size",
            "prefix_dense_intermediate_size",
        ),
        48,
    ),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 24),
    **dict.fromkeys(
        ("sliding_window", "attention_chunk_size", "attention_window_size", "sliding_window_size", "local_attention"),
        WINDOW,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions"),
        256,
    ),
    "first_k_dense_replace": 1,
    "index_topk": 8,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    # recurrent and state-space layers
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_n_groups": 2,
    "n_groups": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
}

ALWAYS = {"num_key_value_heads", "num_experts_per_tok", "n_routed_experts"}
"""Fields to set even where their default is None."""

DEFAULT = object()
"""As an override: leave this field at the config's own default."""

FLOAT32 = {"inkling2_text", "masked:mra", "xglm"}
"""Models that mix float32 into their linears and so run in no other dtype."""

_HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
_MAMBA_HYBRID = {"num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4},
    "esm": {"vocab_size": 33, "mask_token_id": 32},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "granitemoehybrid": _MAMBA_HYBRID,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_hidden_layers": 4, "num_key_value_heads": 4},
    "lfm2_moe": {"num_dense_layers": 1, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"num_hidden_layers": 4},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "ministral": {"head_dim": 16},
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": {
        **_HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 100,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [8, 8],
        "hidden_size": 64,
        "attention_head_size": 16,
    },
    "xlstm": {"chunk_size": 16, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single models need beyond `SIZES`."""


def names() -> list[str]:
    """All names, the causal ones first; those of encoders start with "masked:"."""
    causal = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    masked = [name for name in MODEL_FOR_MASKED_LM_MAPPING_NAMES if name in CONFIG_MAPPING]
    return causal + [f"masked:{name}" for name in masked]


def tiny(name: str, **overrides: Any) -> tuple[PreTrainedModel, Tensor]:
    model_type = name.removeprefix("masked:")
    config = _config(CONFIG_MAPPING[model_type], {**OVERRIDES.get(model_type, {}), **overrides})
    model = _build(name, config).to(torch.float32 if name in FLOAT32 else torch.float64).eval()
    _randomize(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, vocabulary, (2, 40), generator=torch.Generator().manual_seed(1), device="cpu")
    return model, ids


def odd(name: str) -> tuple[PreTrainedModel, Tensor]:
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[name.removeprefix("masked:")])}
    sizes: dict[str, Any] = {"vocab_size": 127}
    for value, group in (
        (6, "num_attention_heads n_head n_heads"),
        (96, "hidden_size n_embd d_model"),
        (3, "num_key_value_heads"),
    ):
        sizes.update(dict.fromkeys(group.split(), value))
    if "kv_lora_rank" in fields:  # low-rank attention has as many kv heads as query heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes.update(dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"), 100))
    return tiny(name, **{key: value for key, value in sizes.items() if key in fields})


def default_on_meta(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return _build(name, CONFIG_MAPPING[name.removeprefix("masked:")]()).eval()


def default_with_few_layers(name: str, layers: int = 8) -> tuple[PreTrainedModel, float]:
    """The default configuration on the meta device, with fewer layers where that can be set, and how many times."""
    cls = CONFIG_MAPPING[name.removeprefix("masked:")]
    depth = cls().get_text_config().num_hidden_layers
    if depth > layers and not cls.sub_configs:
        try:
            config = cls(num_hidden_layers=layers)
            if config.num_hidden_layers == layers:
                with torch.device("meta"):
                    return _build(name, config).eval(), depth / layers
        except Exception:  # a pattern of layers that this depth does not fit
            pass
    return default_on_meta(name), 1.0


def _build(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    masked = name.startswith("masked:")
    mapping = MODEL_FOR_MASKED_LM_MAPPING if masked else MODEL_FOR_CAUSAL_LM_MAPPING
    cls = mapping[type(config)]
    cls = cls[0] if isinstance(cls, tuple) else cls
    if not isinstance(config, cls.config_class):
        config = config.get_text_config()  # the text model of a composite one
    if not masked and "is_decoder" in vars(config):
        config.is_decoder = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the models' own initialisation draws from the global generator
        model = cls(config)
    if model.can_generate():  # what some would force or forbid is no part of a model's forward, the tests' reference
        said = model.generation_config
        ids = {name: getattr(said, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)
    return model


def _config(cls: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name in cls.sub_configs or field.name.startswith("_"):
            continue
        # None usually means "like another field"
        if field.name in SIZES and (field.default is not None or field.name in ALWAYS):
            chosen[field.name] = SIZES[field.name]
    if "kv_lora_rank" in chosen and "num_key_value_heads" in chosen:
        chosen["num_key_value_heads"] = HEADS  # with a latent per token, every head has its own keys
    for name, sub in cls.sub_configs.items():
        inner = overrides.get(name, {})
        if isinstance(inner, dict):
            sub_cls = _default_sub_config(cls, name) if sub is AutoConfig else sub
            if sub_cls is not None:
                chosen[name] = _config(sub_cls, {**OVERRIDES.get(sub_cls.model_type, {}), **inner})
    chosen.update({key: value for key, value in overrides.items() if key not in cls.sub_configs})
    for name in [name for name, value in chosen.items() if value is DEFAULT]:
        del chosen[name]
    return cls(**chosen)


def _default_sub_config(cls: type[PreTrainedConfig], name: str) -> type[PreTrainedConfig] | None:
    try:
        value = vars(cls())[name]
    except Exception:
        return None
    return type(value) if isinstance(value, PreTrainedConfig) else None


def _randomize(model: PreTrainedModel) -> None:
    """Noise on every parameter and saved buffer, on top of the model's own initialisation (which may carry meaning)."""
    generator = torch.Generator().manual_seed(0)
    saved = set(model.state_dict())
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in saved and tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
                # a buffer of several values was computed: tables that belong together, a decay that looks back only
                computed = not isinstance(tensor, torch.nn.Parameter) and tensor.numel() and tensor.max() > tensor.min()
                if not computed:
                    tensor.add_(noise.to(tensor.device) * 0.1)


if __name__ == "__main__":
    from tests.supported_models.capture_survey import main

    sys.exit(main(sys.argv[1:]))
