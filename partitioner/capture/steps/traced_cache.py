"""A transformers cache for the trace of one step: its layers say what they keep, and our ops stand for what they hold.

    keys, values, indexer keys   [.., S, D]   appended to what came before: `APPEND`, [.., T, D]
    conv and recurrent states    [B, ...]     read at first (`READ`), overwritten by the model, returned at the end
    attributes of modules        [B, ...]     the same

The layers are transformers' own, so that models find what they expect; only what would grow is replaced. A cache that
is empty and one that holds zeros are the same to a recurrent state: zeros are what came before the first token.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from partitioner.capture.steps.kept_elsewhere import Attributes, filled_with, leaves_of, rebuilt
from partitioner.capture.steps.watched_cache import WatchedCache, WatchedLayers
from partitioner.errors import CaptureError

__all__ = ["StepCache", "StepObject", "TracedState", "find_states", "states_of_object"]

_LAYERS = "transformers.cache_utils"
_BESIDE, _IN_MODULE, _IN_OBJECT = -1, -2, -3
"""The layer of a state that the cache itself holds, of one that a module holds (`part`: its path and name), and of one
in an object that the model takes in the place of a cache (`part`: the way to it)."""
_PER_SEQUENCE = {"conv": "conv_states", "recurrent": "recurrent_states"}


@dataclass(frozen=True)
class TracedState:
    """One tensor that a layer keeps: per token (shape without batch and tokens), or per sequence (without batch).

    initial: what it is filled with before the first token.
    """

    name: str
    layer: int
    part: str
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    per_token: bool
    initial: float = 0.0


def find_states(model: PreTrainedModel, run: Callable[[Any], None], *, batch: int) -> list[TracedState]:
    """What the layers of a cache hold after `run(cache)` of so many rows, in order, and then what modules do; raises
    where the model keeps more than that.
    """
    cache, attributes = _empty_cache(model), Attributes(model)
    with attributes.watched():
        run(cache)
    if attributes.forget():  # of an earlier run, something may have been left
        cache = _empty_cache(model)
        with attributes.watched():
            run(cache)
    found: list[TracedState] = []
    for number, layer in enumerate(cache.layers):
        found += _states_of(number, layer)
    found += _states_beside_layers(cache)
    found += _states_in_modules(attributes, batch)
    attributes.forget()
    if not found:
        raise CaptureError("the model does not use the cache that it is given")
    return found


def _states_of(number: int, layer: Any) -> Iterable[TracedState]:
    known: set[int] = set()

    def one(part: str, tensor: Any, index: int, *, per_token: bool) -> Iterable[TracedState]:
        if isinstance(tensor, Tensor):
            known.add(id(tensor))
            dims = tuple(tensor.shape[1:])
            shape = (*dims[:-2], dims[-1]) if per_token else dims
            name = f"cache.{number}.{part}" + ("" if per_token else f".{index}")
            yield TracedState(name, number, part, index, shape, tensor.dtype, per_token)

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


def _states_beside_layers(cache: Any) -> Iterable[TracedState]:
    """A cache class of the model's own may hold lists of states, one per layer that has one."""
    for name, value in vars(cache).items():
        if name == "layers":
            continue
        if isinstance(value, list) and _has_tensors(value):
            for index, tensor in enumerate(value):
                if isinstance(tensor, Tensor):
                    shape = tuple(tensor.shape[1:])
                    yield TracedState(
                        f"cache.{index}.{name}", _BESIDE, name, index, shape, tensor.dtype, per_token=False
                    )
        elif isinstance(value, (Tensor, dict)):
            raise CaptureError(f"the cache keeps {name}, which capture does not know ({type(cache).__name__})")


def _empty_cache(model: PreTrainedModel) -> Any:
    """A cache of the kind that the model makes for itself: one that its own file defines, or transformers' own."""
    beside = vars(sys.modules[type(model).__module__])
    own = [kind for kind in beside.values() if _is_cache(kind) and kind.__module__ == type(model).__module__]
    if len(own) > 1:
        raise CaptureError(f"the model has several caches of its own: {', '.join(kind.__name__ for kind in own)}")
    kind = own[0] if own else DynamicCache
    counting: Any = types.new_class(f"Step{kind.__name__}", (WatchedCache, _Counting, kind))
    takes_config = "config" in inspect.signature(kind).parameters
    return counting(config=model.config) if takes_config else counting()


def _is_cache(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, DynamicCache)


class _Counting:
    """Knows how many tokens came before where no layer does, because all keep one state for all tokens."""

    past: Any = 0
    layers: list[Any]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx) if self._has_attention() else self.past  # type: ignore[misc]

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> Any:
        if self._has_attention():
            return super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
        return self.past + query_length, 0

    def _has_attention(self) -> bool:
        return not self.layers or any(isinstance(layer, CacheLayerMixin) for layer in self.layers)


def _states_in_modules(attributes: Attributes, batch: int) -> Iterable[TracedState]:
    for (path, name), (value, initial) in attributes.new().items():
        where = f"{path}.{name}"
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != batch or initial is None:
            raise CaptureError(
                f"the model keeps tensors of its own between tokens ({where}), which are not one row per sequence, or "
                "of which it is not known what they are before the first token"
            )
        yield TracedState(where, _IN_MODULE, where, 0, tuple(value.shape[1:]), value.dtype, False, initial)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or any(isinstance(item, Tensor) for item in value)


class StepCache:
    """A cache (`cache`) whose layers hold `states`, by position of the slots: `append` and `read` make the tensors."""

    def __init__(
        self,
        model: PreTrainedModel,
        states: list[TracedState],
        *,
        past: Any,
        append: Callable[[Tensor, int], Tensor],
        read: Callable[[TracedState, int], Tensor],
    ) -> None:
        self.states, self._model = states, model
        self.cache = _empty_cache(model)
        self.cache.past = past
        number = {(s.layer, s.part): i for i, s in enumerate(states)}
        replicated = self.cache.layer_class_to_replicate
        while len(self.cache.layers) <= max((state.layer for state in states), default=-1):
            assert replicated is not None
            self.cache.layers.append(replicated())
        for i, layer in enumerate(self.cache.layers):
            if isinstance(layer, CacheLayerMixin):
                step = _Step({part: n for (at, part), n in number.items() if at == i}, past, append)
                self.cache.layers[i] = _appending(layer, step)
        for i, state in enumerate(states):
            if not state.per_token:
                self._preset(state, read(state, i))
        self.cache.layers = WatchedLayers(self.cache)

    def _preset(self, state: TracedState, tensor: Tensor) -> None:
        if state.layer == _IN_MODULE:
            setattr(*self._place(state), tensor)
            return
        if state.layer == _BESIDE:
            held = vars(self.cache)[state.part]
            held += [[] for _ in range(len(held), state.index + 1)]  # as the model fills it up
            held[state.index] = tensor
            return
        layer: Any = self.cache.layers[state.layer]
        vars(layer)[_PER_SEQUENCE[state.part]][state.index] = tensor
        vars(layer)[f"is_{_PER_SEQUENCE[state.part]}_initialized"][state.index] = True
        layer.has_previous_state[state.index] = True
        if state.part == "conv":
            layer.conv_kernel_size[state.index] = tensor.shape[-1]
        if layer.device is None:
            layer.dtype, layer.device = tensor.dtype, tensor.device

    def written(self) -> list[Tensor]:
        """What the states per sequence hold now, in their order; modules hold nothing from then on."""
        found = [self._held(state) for state in self.states if not state.per_token]
        for state in self.states:
            if state.layer == _IN_MODULE:
                setattr(*self._place(state), None)
        return found

    def _place(self, state: TracedState) -> tuple[Any, str]:
        path, _, name = state.part.rpartition(".")
        return self._model.get_submodule(path), name

    def _held(self, state: TracedState) -> Tensor:
        if state.layer == _IN_MODULE:
            module, name = self._place(state)
            kept: Tensor = vars(module)[name]
            return kept
        if state.layer == _BESIDE:
            held: Tensor = vars(self.cache)[state.part][state.index]
        else:
            held = vars(self.cache.layers[state.layer])[_PER_SEQUENCE[state.part]][state.index]
        return held


@dataclass
class _Step:
    """numbers: of the layer's states by part. past: how many tokens came before. added: in this step, by now."""

    numbers: dict[str, int]
    past: Any
    append: Callable[[Tensor, int], Tensor]
    added: Any = 0
    taken: bool = False

    def put(self, part: str, tensor: Tensor) -> Tensor:
        if part not in self.numbers:
            raise CaptureError(f"a layer keeps a {part} in the trace that it did not keep in a plain run")
        return self.append(tensor, self.numbers[part])


class _Appending:
    """Goes before a layer's own class: what grows with the tokens is our op."""

    _step: _Step

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        step = self._step
        if step.taken:
            raise CaptureError("a layer of the cache is added to twice in one step")
        step.taken, step.added = True, key_states.shape[-2]
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
        _classes[kind] = types.new_class(f"Step{kind.__name__}", (_Appending, kind))
    made: Any = object.__new__(_classes[kind])
    made.__dict__.update(vars(layer))
    made._step, made.is_initialized = step, True
    return made


class StepObject:
    """What a model takes and returns of its own in the place of a cache (`cache`), whose tensors are `states`.

    example: one of them. other: what stands for a tensor that is not one row per sequence.
    """

    def __init__(
        self,
        states: list[TracedState],
        *,
        example: Any,
        read: Callable[[TracedState, int], Tensor],
        other: Callable[[Tensor], Tensor],
    ) -> None:
        self.states = states
        numbers = {state.part: number for number, state in enumerate(states)}

        def leaf(path: tuple[str, ...], tensor: Tensor) -> Tensor:
            number = numbers.get(".".join(path))
            return other(tensor) if number is None else read(states[number], number)

        self.cache = rebuilt(example, leaf)

    def written(self) -> list[Tensor]:
        held = {".".join(path): tensor for path, tensor in leaves_of(self.cache)}
        return [held[state.part] for state in self.states]


def states_of_object(name: str, value: Any, *, batch: int) -> list[TracedState]:
    """The tensors that what the model takes as `name` leads to, but for those that are not one row per sequence."""
    found = []
    for path, tensor in leaves_of(value):
        if not tensor.dim() or tensor.shape[0] != batch:
            continue
        initial, where = filled_with(tensor), ".".join(path)
        if initial is None:
            raise CaptureError(f"the model keeps {name}.{where}, and what that is before the first token is not known")
        shape = tuple(tensor.shape[1:])
        found.append(TracedState(f"{name}.{where}", _IN_OBJECT, where, 0, shape, tensor.dtype, False, initial))
    return found
