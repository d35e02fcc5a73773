"""The trace with a cache, identical layers once: each layer's own states, and nothing of another layer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BambaConfig, BambaForCausalLM

from partitioner.capture.layers.layer_index import LayerIndex
from partitioner.capture.layers.share_layers import every_layer
from partitioner.capture.steps.watched_cache import WatchedLayers
from partitioner.compile.tracing.trace import trace_step
from partitioner.program.program import Program
from tests.partitioner.capture.layers.test_traced_once import SIZES, llama, number_traced
from tests.supported_models.columns.same_program import difference

SHALLOW = 4
"""The first, the last and two in between."""


def compared(model: Any) -> tuple[Program, Program]:
    once = trace_step(model)
    with every_layer():
        return once, trace_step(model)


def test_attention_that_adds_to_its_cache() -> None:
    once, full = compared(llama(SHALLOW))
    assert number_traced(once) == 2
    assert difference(once, full) is None


@pytest.mark.slow
def test_states_that_each_token_changes() -> None:
    torch.manual_seed(0)
    config = BambaConfig(
        **{**SIZES, "num_hidden_layers": 8}, attn_layer_indices=[1, 3, 5, 7], mamba_n_heads=4, mamba_d_head=8,
        mamba_d_state=8, mamba_n_groups=2, mamba_chunk_size=8,
    )  # fmt: skip
    once, full = compared(BambaForCausalLM(config).double().eval())
    assert number_traced(once) <= 5
    assert difference(once, full) is None
    names = [name for name in once.states if name.startswith("cache.4.")]
    assert names  # each layer has its own
    node = next(node for node in once.graph.nodes if node.kwargs.get("state") == names[0])
    node.kwargs = {**node.kwargs, "state": names[0].replace("cache.4.", "cache.2.")}
    assert difference(once, full) is not None


def test_a_layer_that_asks_about_another_stands_for_none() -> None:
    told: list[str] = []

    class Cache:
        layers = ("first", "second")

    cache: Any = Cache()
    layers = WatchedLayers(cache)
    vars(cache).update(_told=told.append, _number=1)
    assert layers[LayerIndex(1, told.append)] == "second"
    assert not told
    assert layers[0] == "first"
    assert layers[LayerIndex(0, told.append)] == "first"
    assert list(layers) == ["first", "second"]
    assert len(told) == 3


def test_what_a_layer_asks_of_the_whole_cache_is_seen_in_the_trace() -> None:
    model = llama(SHALLOW)
    for layer in model.model.layers:
        own = layer.self_attn.forward

        def forward(*args: Any, own: Any = own, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            scale = 1.0 if cache is None else float(len(cache.layers) > 0 and cache.layers[0] is not None)
            out, weights = own(*args, **kwargs)
            return out * scale, weights

        layer.self_attn.forward = forward
    once, full = compared(model)
    assert number_traced(once) == SHALLOW
    assert difference(once, full) is None
