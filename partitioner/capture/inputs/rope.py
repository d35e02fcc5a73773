"""Fix the rotary embeddings that change their frequencies with the length of the sequence.

transformers recomputes the frequencies of "dynamic" (NTK scaling) and "longrope" (arXiv:2402.13753) embeddings inside
forward, from the largest position it sees. A graph cannot, and a model whose keys are cached must not: so the
frequencies are those of the longest sequence that will be run, computed by the module's own rule.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from partitioner.capture.trace.weight_names import ModelWeights
from partitioner.errors import CaptureError

__all__ = ["fix_rope"]

_FIXED = "default"
"""The rope_type under which transformers' forward leaves the frequencies alone."""


def fix_rope(
    fake_model: PreTrainedModel, weights: ModelWeights, *, max_length: int | None
) -> tuple[list[str], int | None]:
    """Fix every such module of the fake model, put its frequencies into `weights`, and say so: one note each."""
    notes: list[str] = []
    longest: int | None = None
    for path, module in fake_model.named_modules():
        kinds = vars(module).get("rope_type")
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        changing = {
            layer: kind for layer, kind in by_layer.items() if kind and ("dynamic" in kind or kind == "longrope")
        }
        if not changing:
            continue
        shell = _with_values(module, path, weights)
        for layer, kind in changing.items():
            limit = _original_length(module, path, layer) if max_length is None else max_length
            _run(shell, path, layer, limit)
            longest = limit if longest is None else min(longest, limit)
            notes.append(f"RoPE {kind!r} of {path} is fixed for sequences of up to {limit} tokens")
        for name, value in shell._buffers.items():
            if value is not None and name in module._buffers:
                weights.fix(f"{path}.{name}", value)
        for name, value in vars(shell).items():
            if "attention_scaling" in name:
                setattr(module, name, value)
        module.rope_type = {**by_layer, **dict.fromkeys(changing, _FIXED)} if isinstance(kinds, dict) else _FIXED
    return notes, longest


def _with_values(module: nn.Module, path: str, weights: ModelWeights) -> nn.Module:
    """A copy of the fake model's module with the real values of its buffers, as they are before the first token."""
    shell = copy.copy(module)
    shell.__dict__ = dict(vars(module))
    names = {name: weights.canonical[f"{path}.{name}"] for name, value in module._buffers.items() if value is not None}
    values = weights.data(list(names.values()))
    shell._buffers = {name: values[full].cpu().clone() for name, full in names.items()}
    for name, value in list(shell._buffers.items()):
        start = name.replace("original_inv_freq", "inv_freq")
        if value is not None and start != name and start in shell._buffers:
            shell._buffers[start] = value.clone()
    return shell


def _run(shell: nn.Module, path: str, layer: str | None, limit: int) -> None:
    arguments: dict[str, Any] = {} if layer is None else {"layer_type": layer}
    last = torch.tensor([[limit - 1]])
    try:
        with torch.no_grad():
            shell(torch.zeros(1, 1, 1), last, **arguments)
    except Exception as error:
        raise CaptureError(
            f"cannot fix the rotary embedding {path!r} for {limit} tokens: {type(error).__name__}: {error}"
        ) from error


def _original_length(module: Any, path: str, layer: str | None) -> int:
    try:
        parameters = module.config.rope_parameters
        parameters = parameters if layer is None else parameters[layer]
        return int(parameters.get("original_max_position_embeddings") or module.config.max_position_embeddings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CaptureError(
            f"cannot fix the rotary embedding {path!r}: for which length it is made is unknown ({error}); give "
            "partition(..., max_length=), or rope_parameters with original_max_position_embeddings in its config"
        ) from error
