"""`capture_step`: the model as a graph that continues sequences, by the model's own use of a cache.

    probe      which tensors the model's cache holds, and the kinds of its masks       cache.py, probe.py
    export     with a cache whose layers are ours                                       trace.py, cache.py
    fold       attention that reads its cache as it stands is attention again; the rest reads it by ops    step_fold.py

    input_ids, position_ids [B, S]    slots [T]: 0, 1, 2 ...    active [B]: rows whose states move on

A model with states per sequence is traced for one token at a time: its own code has a branch for that, and a state that
is all zeros stands for no tokens. Others take S tokens at once.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from transformers import PreTrainedModel

from partitioner.capture.capture import describe_weights, ends_of, generation_of, limits_of
from partitioner.capture.inputs.graph_inputs import BATCH, LENGTH, choose_inputs
from partitioner.capture.inputs.probe import Probe, probe
from partitioner.capture.inputs.rope import fix_rope
from partitioner.capture.layers.share_layers import SharedLayers
from partitioner.capture.layers.traced_once import traced_once
from partitioner.capture.steps.fold_states import fold_steps
from partitioner.capture.steps.layer_states import LayerStates
from partitioner.capture.steps.position_tables import most_slots
from partitioner.capture.steps.traced_cache import StepCache, TracedState, find_states
from partitioner.capture.trace.build_graph import Builder
from partitioner.capture.trace.export_graph import export_step, result_of
from partitioner.capture.trace.fake_model import configs, make_fake_model
from partitioner.capture.trace.functionalize import functionalize
from partitioner.capture.trace.shape_limits import check_together
from partitioner.capture.trace.transformers_hooks import APPEND, READ
from partitioner.capture.trace.weight_names import ModelWeights
from partitioner.errors import CaptureError
from partitioner.program.program import Input, Program, State
from partitioner.program.progress import timed
from partitioner.sharding.layout import REPLICATED
from partitioner.sharding.mesh import Mesh

__all__ = ["capture_step"]

SLOTS = 211
"""Slots in the example: a prime, and more than tokens, so that there are some before them."""
_CACHES = ("past_key_values", "cache_params")
"""The parameters of forward that take a transformers Cache."""
_DIMS = {"slots": ("slots",)}


def capture_step(model: PreTrainedModel, *, mesh: Mesh, max_length: int | None = None) -> Program:
    """Raises `CaptureError` where the model keeps what it remembers other than in a transformers Cache."""
    fake = FakeTensorMode()
    fake_model = make_fake_model(model, fake)
    known = ModelWeights(model)
    notes, longest = fix_rope(fake_model, known, max_length=max_length)
    _require_counting_from_zero(fake_model, fake, known)
    for config in configs(fake_model):
        config.use_cache = True
    cache = _parameter(fake_model)
    states = _find_states(fake_model, cache, fake, known)
    recurrent = any(not state.per_token for state in states)
    length = 1 if recurrent else LENGTH
    example = _example(fake_model, length)
    kinds = _probe_masks(fake_model, cache, states, example, fake, known)
    symbols: dict[int, Any] = {0: Dim.DYNAMIC} if recurrent else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    dims = {name: {0: Dim.DYNAMIC} if name in _DIMS else symbols for name in example}

    def build(shared: SharedLayers | None) -> tuple[Builder, fx.Graph]:
        traced = _Stepping(fake_model, tuple(example), cache, states, shared)
        with timed("export" if shared is None else "export, identical layers once"):
            exported = functionalize(export_step(traced, fake_model, example, kinds, dims, shared=shared))
        builder = Builder(exported, tuple(example), known.canonical.__getitem__, _DIMS, shared=shared)
        return builder, builder.build()

    (builder, graph), layers = traced_once(fake_model, build)
    notes += builder.limits()
    check_together(builder.guards, builder.symbols, name=type(model).__name__)
    inputs = fold_steps(graph, kinds, states, builder.further, builder.symbols)
    most = most_slots(graph, builder.symbols)
    if most is not None:
        low, high = builder.ranges.get("slots", (1, None))
        builder.ranges["slots"] = (low, most if high is None else min(high, most))
    weights, values = describe_weights(graph, builder, known)
    used = {str(node.kwargs["state"]) for node in graph.nodes if "state" in node.kwargs}
    if recurrent:
        builder.ranges["sequence"] = (1, 1)
        notes.append("prompts run token by token: what the model remembers is a state that each token changes")
    return Program(
        graph=graph,
        inputs=tuple(Input(name, node.meta["val"], _DEFAULTS.get(name, "required")) for name, node in inputs.items()),
        weights=weights,
        weight_data=values,
        symbols=builder.symbols,
        mesh=mesh,
        name=type(model).__name__,
        limits=limits_of(builder.ranges, longest),
        eos_token_id=ends_of(model),
        generation=generation_of(model),
        states={
            s.name: State(s.name, s.shape, s.dtype, REPLICATED(len(s.shape)), per_token=s.per_token)
            for s in states
            if s.name in used
        },
        layers=layers,
        notes=notes,
    )


_DEFAULTS = {"position_ids": "arange"}


class _Stepping(nn.Module):
    """The model with positional inputs; what it returns, and what its states per sequence have become."""

    def __init__(
        self,
        model: PreTrainedModel,
        names: tuple[str, ...],
        cache: str,
        states: list[TracedState],
        shared: SharedLayers | None,
    ) -> None:
        super().__init__()
        self.model, self.shared = model, shared
        self.names, self.cache, self.states = names, cache, states

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        step = _step_cache(self.model, self.states, given, given["input_ids"])
        if self.shared is not None:
            self.shared.cache, self.shared.append, self.shared.common = LayerStates(step), APPEND, ("slots",)
        output = self.model(**given, **{self.cache: step.cache}, use_cache=True)
        return (result_of(self.model, output), *step.written())


def _step_cache(
    model: PreTrainedModel, states: list[TracedState], given: dict[str, Tensor], batch: Tensor
) -> StepCache:
    """Takes `slots` out of the inputs that are given to the model; `batch` has as many rows as they."""
    slots, ids = given.pop("slots"), given["input_ids"]
    return StepCache(
        model,
        states,
        past=slots.shape[0] - ids.shape[1],
        append=lambda x, number: APPEND(x, slots, number),
        read=lambda state, number: READ(batch, list(state.shape), state.dtype, number),
    )


def _parameter(fake_model: PreTrainedModel) -> str:
    accepted = inspect.signature(type(fake_model).forward).parameters
    found = next((name for name in _CACHES if name in accepted), None)
    if found is None or "input_ids" not in accepted:
        raise CaptureError(
            f"{type(fake_model).__name__} takes no transformers Cache: its forward takes {', '.join(accepted)}"
        )
    return found


def _require_counting_from_zero(fake_model: PreTrainedModel, fake: FakeTensorMode, known: ModelWeights) -> None:
    """Positions are given as 0, 1, 2 ...: a model that makes others of its tokens would be given wrong ones."""
    if "position_ids" not in inspect.signature(type(fake_model).forward).parameters:
        return
    if "position_ids" not in choose_inputs(fake_model, fake, known.indices(), length=None).tensors:
        raise CaptureError(f"{type(fake_model).__name__} counts positions by a rule of its own, not 0, 1, 2 and so on")


def _example(fake_model: PreTrainedModel, length: int) -> dict[str, Tensor]:
    accepted = inspect.signature(type(fake_model).forward).parameters
    vocabulary = fake_model.get_input_embeddings().weight.shape[0]
    shape = (BATCH, length)
    found = {"input_ids": torch.arange(BATCH * length).reshape(shape) % max(vocabulary // 2, 1) + vocabulary // 2}
    if "position_ids" in accepted:
        found["position_ids"] = torch.arange(SLOTS - length, SLOTS).expand(shape).contiguous()
    found["slots"] = torch.arange(SLOTS)
    return found


def _find_states(
    fake_model: PreTrainedModel, cache: str, fake: FakeTensorMode, known: ModelWeights
) -> list[TracedState]:
    given = _example(fake_model, LENGTH)
    inputs = {name: value for name, value in given.items() if name != "slots"}
    if "position_ids" in inputs:
        inputs["position_ids"] = torch.arange(LENGTH).expand(BATCH, LENGTH).contiguous()

    def run(empty: Any) -> None:
        found = probe(fake_model, {**inputs, cache: empty, "use_cache": True}, fake, known.indices())
        _succeeded(fake_model, found)

    return find_states(fake_model, run)


def _probe_masks(
    fake_model: PreTrainedModel,
    cache: str,
    states: list[TracedState],
    example: dict[str, Tensor],
    fake: FakeTensorMode,
    known: ModelWeights,
) -> list[Any]:
    given = dict(example)
    past = SLOTS - given["input_ids"].shape[1]
    step = _step_cache(fake_model, states, given, fake.from_tensor(given["input_ids"]))
    found = probe(fake_model, {**given, cache: step.cache, "use_cache": True}, fake, known.indices(), offset=past)
    _succeeded(fake_model, found)
    if None in found.kinds:
        raise CaptureError(f"{type(fake_model).__name__} masks its attention by a rule that capture does not know")
    if not all(kind.causal for kind in found.kinds if kind is not None):
        raise CaptureError(f"{type(fake_model).__name__} lets tokens see those after them")
    return found.kinds


def _succeeded(fake_model: PreTrainedModel, found: Probe) -> None:
    if found.failure is not None:
        raise CaptureError(
            f"{type(fake_model).__name__} cannot be run with a cache: {type(found.failure).__name__}: {found.failure}"
        ) from found.failure
