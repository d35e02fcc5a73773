"""Llama shapes without data, and weights drawn where they are used: the same ones by every rank and every plan.

    model = decoder("8b", layers=32, positions=8192, device=device)      on the meta device
    Engine.connect(parts, DrawnWeights(model, device), device=...)       matrices ~ N(0, 1 / columns), norms of ones

Each tensor is drawn whole on the device, from a seed made of its name, and the block that is asked for is cut out: a
model that no single GPU holds can so be run by several.
"""

from __future__ import annotations

import copy
import zlib
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["SHAPES", "DrawnWeights", "decoder"]

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 4, "vocab_size": 256},
}  # fmt: skip

NARROW = {"num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8, "moe_intermediate_size": 8}
"""Sizes that no buffer of rotary embeddings has to do with."""


def decoder(shape: str, *, layers: int | None, positions: int, device: torch.device) -> Any:
    """bfloat16 on GPUs, float32 elsewhere. layers: None, as many as the shape has."""
    sizes = dict(SHAPES[shape])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config = LlamaConfig(
        **sizes, max_position_embeddings=positions, rope_theta=500000.0, attn_implementation="sdpa", eos_token_id=None
    )
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(
            config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
        ).eval()


class DrawnWeights:
    """A source of weights for engines; see the module's docstring."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._device = device
        self._drawn = {name: (each.shape, each.dtype) for name, each in model.named_parameters()}
        narrow = copy.deepcopy(model.config)
        for name, size in NARROW.items():
            if hasattr(narrow, name):
                setattr(narrow, name, size)
        self._computed = dict(type(model)(narrow).named_buffers())  # of rotary embeddings: no size but a head's matters

    def __call__(self, name: str, block: tuple[tuple[int, int], ...]) -> Tensor:
        at = tuple(slice(*ends) for ends in block)
        if name in self._computed:
            return self._computed[name][at].to(self._device)
        shape, dtype = self._drawn[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=self._device)[at]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, dtype=dtype, device=self._device, generator=generator)[at] * shape[-1] ** -0.5
