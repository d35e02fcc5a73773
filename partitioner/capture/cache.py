"""A transformers cache for the trace of one step: its layers say what they keep, and our ops stand for what they hold.

    keys, values, indexer keys   [.., S, D]   appended to what came before: `APPEND`, [.., T, D]
    conv and recurrent states    [B, ...]     read at first (`READ`), overwritten by the model, returned at the end

The layers are transformers' own, so that models find what they expect; only what would grow is replaced. A cache that
is empty and one that holds zeros are the same to a recurrent state: zeros are what came before the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from partitioner.errors import CaptureError

__all__ = ["Remembered", "StepCache", "find_states"]

_LAYERS = "transformers.cache_utils"
_PER_SEQUENCE = {"conv": "conv_states", "recurrent": "recurrent_states"}


@dataclass(frozen=True)
class Remembered:
    """One tensor that a layer keeps: per token (shape without batch and tokens), or per sequence (without batch)."""

    name: str
    layer: int
    part: str
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    per_token: bool


def find_states(model: PreTrainedModel, run: Callable[[Any], None]) -> list[Remembered]:
    """What the layers of a cache hold after `run(cache)`, in order; raises where that is not all that the model keeps."""
    cache = DynamicCache(config=model.config)
    before = _tensors_of_modules(model)
    run(cache)
    kept = [name for name in _tensors_of_modules(model) if name not in before]
    if kept:
        raise CaptureError(f"the model keeps tensors of its own between tokens ({kept[0]}), not in a transformers Cache")
    found: list[Remembered] = []
    for number, layer in enumerate(cache.layers):
        found += _states_of(number, layer)
    if not found:
        raise CaptureError("the model does not use the cache that it is given")
    return found


def _states_of(number: int, layer: Any) -> Iterable[Remembered]:
    known: set[int] = set()

    def one(part: str, tensor: Any, index: int, *, per_token: bool) -> Iterable[Remembered]:
        if isinstance(tensor, Tensor):
            known.add(id(tensor))
            dims = tuple(tensor.shape[1:])
            shape = (*dims[:-2], dims[-1]) if per_token else dims
            name = f"cache.{number}.{part}" + ("" if per_token else f".{index}")
            yield Remembered(name, number, part, index, shape, tensor.dtype, per_token)

    if type(layer).__module__ != _LAYERS:
        raise CaptureError(f"layer {number} keeps its tokens in a cache of its own kind ({type(layer).__name__})")
    if isinstance(layer, CacheLayerMixin):
        yield from one("key", layer.keys, 0, per_token=True)
        yield from one("value", layer.values, 0, per_token=True)
        yield from one("indexer", vars(layer).get("indexer_keys"), 0, per_token=True)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for part, attribute in _PER_SEQUENCE.items():
            for index, tensor in vars(layer)[attribute].items():
                yield from one(part, tensor, index, per_token=False)
    known |= {id(vars(layer).get("_sliding_window_tensor"))}  # a constant
    for name, value in vars(layer).items():
        if isinstance(value, Tensor) and value.dim() and id(value) not in known:
            raise CaptureError(f"layer {number} keeps {name}, which capture does not know ({type(layer).__name__})")


def _tensors_of_modules(model: PreTrainedModel) -> set[str]:
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in [*vars(module).items(), *module._buffers.items()]
        if isinstance(value, (Tensor, list, tuple)) and _has_tensors(value)
    }


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or any(isinstance(item, Tensor) for item in value)


class StepCache:
    """A cache (`cache`) whose layers hold `states`, by position of the slots: `append` and `read` make the tensors."""

    def __init__(
        self,
        model: PreTrainedModel,
        states: list[Remembered],
        *,
        past: Any,
        append: Callable[[Tensor, int], Tensor],
        read: Callable[[Remembered, int], Tensor],
    ) -> None:
        self.states = states
        self.cache = DynamicCache(config=model.config)
        number = {(s.layer, s.part): i for i, s in enumerate(states)}
        replicated = self.cache.layer_class_to_replicate
        while len(self.cache.layers) <= max(state.layer for state in states):
            assert replicated is not None
            self.cache.layers.append(replicated())
        for i, layer in enumerate(self.cache.layers):
            if isinstance(layer, CacheLayerMixin):
                step = _Step({part: n for (at, part), n in number.items() if at == i}, past, append)
                self.cache.layers[i] = _appending(layer, step)
        for i, state in enumerate(states):
            if not state.per_token:
                self._preset(state, read(state, i))

    def _preset(self, state: Remembered, tensor: Tensor) -> None:
        layer: Any = self.cache.layers[state.layer]
        vars(layer)[_PER_SEQUENCE[state.part]][state.index] = tensor
        vars(layer)[f"is_{_PER_SEQUENCE[state.part]}_initialized"][state.index] = True
        layer.has_previous_state[state.index] = True
        if state.part == "conv":
            layer.conv_kernel_size[state.index] = tensor.shape[-1]
        if layer.device is None:
            layer.dtype, layer.device = tensor.dtype, tensor.device

    def written(self) -> list[Tensor]:
        """What the states per sequence hold now, in their order."""
        return [
            vars(self.cache.layers[state.layer])[_PER_SEQUENCE[state.part]][state.index]
            for state in self.states
            if not state.per_token
        ]


@dataclass
class _Step:
    """numbers: of the layer's states by part. past: how many tokens came before. added: in this step, by now."""

    numbers: dict[str, int]
    past: Any
    append: Callable[[Tensor, int], Tensor]
    added: Any = 0

    def put(self, part: str, tensor: Tensor) -> Tensor:
        if part not in self.numbers:
            raise CaptureError(f"a layer keeps a {part} in the trace that it did not keep in a plain run")
        return self.append(tensor, self.numbers[part])


class _Appending:
    """Goes before a layer's own class: what grows with the tokens is our op."""

    _step: _Step

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        step = self._step
        if step.added is not 0:  # noqa: F632 - a symbol compares as a guard
            raise CaptureError("a layer of the cache is added to twice in one step")
        step.added = key_states.shape[-2]
        return step.put("key", key_states), step.put("value", value_states)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        return self._step.put("indexer", indexer_key_states)

    def get_seq_length(self) -> Any:
        return self._step.past + self._step.added

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        return self._step.past + query_length, 0


_classes: dict[type, type] = {}


def _appending(layer: Any, step: _Step) -> Any:
    kind = type(layer)
    if kind not in _classes:
        _classes[kind] = type(kind)(f"Step{kind.__name__}", (_Appending, kind), {})
    made = object.__new__(_classes[kind])
    made.__dict__.update(vars(layer))
    made._step, made.is_initialized = step, True
    return made
