"""Models of a few hand-made layers between an embedding and a head, for what no architecture shows by itself.

    layered(Layer)    input_ids -> embedding -> x + layer(x), for each layer -> head -> logits

A `Layer` is a module that is made from the hidden size and maps x[B,S,H] to x[B,S,H].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from partitioner import Parts, Plan
from partitioner.compile.compare import difference
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from tests.support import reference

HIDDEN, VOCABULARY = 12, 19


class LayeredConfig(PreTrainedConfig):
    model_type = "layered"

    def __init__(self, vocab_size: int = VOCABULARY, hidden_size: int = HIDDEN, **kwargs: Any) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


class Layered(PreTrainedModel):
    config_class = LayeredConfig
    base_model_prefix = "model"

    def __init__(self, config: LayeredConfig, layers: list[nn.Module]) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> CausalLMOutput:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return CausalLMOutput(logits=self.head(x))


class Gated(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.up, self.out = nn.Linear(hidden, 9), nn.Linear(hidden, 9), nn.Linear(9, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.gate(x).sigmoid() * self.up(x))
        return out


def layered(layer: Callable[[int], nn.Module], count: int = 1) -> Layered:
    model = Layered(LayeredConfig(), [layer(HIDDEN) for _ in range(count)]).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


@functools.cache
def layered_once(layer: Callable[[int], nn.Module], count: int = 1) -> Layered:
    """The same model whoever asks, for `partitioned`, which traces each model once."""
    return layered(layer, count)


@functools.cache
def _traced(model: Layered) -> Program:
    return in_float64(trace(model))


def partitioned(model: Layered, tp: int, **plan: Any) -> tuple[Parts[Any], float]:
    """The model compiled in float64, and the error of the simulated ranks against its own code."""
    parts = compile_program(_traced(model), Plan(tp=tp, **plan))
    ids = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(2))
    expected = reference.forward(model.double(), exact=False, lifted=True, input_ids=ids)
    return parts, difference(parts.simulate(input_ids=ids), expected)
