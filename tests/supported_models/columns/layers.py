"""Whether a model of several layers of each kind, of which each kind is traced once, is the program of the full trace.

deep(name)      built tiny, three times as deep as the zoo has it: six layers or more
the program     the same nodes, weights and constants as with every layer traced
its output      the same numbers in float64, bit by bit
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from partitioner.capture.layers.share_layers import every_layer
from partitioner.compile.tracing.trace import trace, trace_step
from partitioner.errors import CaptureError
from partitioner.proof.float64 import in_float64
from tests.support import interpret, zoo
from tests.supported_models.columns.same_program import difference

__all__ = ["compare_layers", "deep"]

_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers",
    "num_encoder_layers",
)  # fmt: skip
_PER_LAYER: dict[str, Any] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "bamba": {"attn_layer_indices": [1, 3, 5, 7, 9, 11]},
}
_TIMES = 3


def deep(name: str) -> PreTrainedModel:
    """With what the zoo says of each layer repeated."""
    model_type = name.removeprefix("masked:")
    known = zoo.OVERRIDES.get(model_type, {})
    depth = next((known[field] for field in _DEPTHS if field in known), zoo.LAYERS)
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    sizes: dict[str, Any] = {field: depth * _TIMES for field in _DEPTHS if field in fields}
    sizes |= {key: value * _TIMES for key, value in known.items() if isinstance(value, list) and len(value) == depth}
    inner = CONFIG_MAPPING[model_type].sub_configs.get("text_config")
    if inner is not None and not sizes:  # of a composite configuration, its text model is as deep
        sizes["text_config"] = {field: depth * _TIMES for field in _DEPTHS if field in vars(inner())}
    model, _ = zoo.tiny(name, **sizes, **_PER_LAYER.get(model_type, {}))
    return model


def compare_layers(name: str, *, steps: bool) -> dict[str, Any]:
    """verdict: "equal", "wrong" or "refused"; steps: of the trace with a cache as well."""
    model = deep(name)
    start = time.perf_counter()
    once = trace(model)
    seconds = time.perf_counter() - start
    assert once.layers is not None
    row: dict[str, Any] = {"verdict": "equal", "layers": once.layers.layers, "traced": once.layers.traced}
    row["why_not"] = once.layers.why
    start = time.perf_counter()
    with every_layer():
        full = trace(model)
    row["seconds"] = [round(seconds, 1), round(time.perf_counter() - start, 1)]
    found = difference(once, full)
    if found is not None:
        return {**row, "verdict": "wrong", "why": found[:300]}
    ids = torch.randint(3, model.get_input_embeddings().weight.shape[0], (2, 11))
    outputs = [interpret.run(in_float64(program), lifted=True, input_ids=ids) for program in (once, full)]
    if not torch.equal(*outputs):
        return {**row, "verdict": "wrong", "why": "its outputs differ"}
    return {**row, **(_steps(model) if steps else {})}


def _steps(model: PreTrainedModel) -> dict[str, Any]:
    try:
        once = trace_step(model)
    except CaptureError:
        return {}
    with every_layer():
        full = trace_step(model)
    if once.layers is None:
        return {}
    row: dict[str, Any] = {"traced_of_steps": once.layers.traced, "why_not_of_steps": once.layers.why}
    found = difference(once, full)
    return row if found is None else {**row, "verdict": "wrong", "why": f"with a cache: {found[:300]}"}
