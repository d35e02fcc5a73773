"""`capture_step`: the model as a graph that continues sequences, by the model's own use of a cache.

    probe      which tensors the model's cache holds, and the kinds of its masks       cache.py, probe.py
    export     with a cache whose layers are ours                                       trace.py, cache.py
    fold       attention that reads its cache as it stands is attention again; the rest reads it by ops    step_fold.py

    input_ids, position_ids [B, S]    slots [T]: 0, 1, 2 ...    active [B]: rows whose states move on

A model with states per sequence is traced for one token at a time: its own code has a branch for that, and a state that
is all zeros stands for no tokens. Others take S tokens at once. `capture_piece` traces what the code of a model with
such states does with S tokens behind others: whether that is what S single steps do is for `proof/recurrences.py`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from transformers import PreTrainedModel

from partitioner.capture.capture import describe_weights, ends_of, generation_of, limits_of
from partitioner.capture.inputs.graph_inputs import BATCH, LENGTH, choose_inputs, example_ids
from partitioner.capture.inputs.probe import Probe, probe
from partitioner.capture.inputs.rope import fix_rope
from partitioner.capture.layers.share_layers import SharedLayers
from partitioner.capture.layers.traced_once import traced_in_full, traced_once
from partitioner.capture.steps.fold_recurrences import fold_recurrences
from partitioner.capture.steps.fold_states import fold_steps
from partitioner.capture.steps.kept_elsewhere import own_object
from partitioner.capture.steps.layer_states import LayerStates
from partitioner.capture.steps.position_tables import most_slots
from partitioner.capture.steps.rows_apart import RowsApart
from partitioner.capture.steps.split_states import split_states
from partitioner.capture.steps.traced_cache import (
    StepCache,
    StepObject,
    TracedState,
    find_states,
    states_of_object,
)
from partitioner.capture.trace.build_graph import Builder
from partitioner.capture.trace.export_graph import export_step, result_of
from partitioner.capture.trace.fake_model import configs, make_fake_model
from partitioner.capture.trace.functionalize import functionalize
from partitioner.capture.trace.recurrence_hooks import recurrences_installed
from partitioner.capture.trace.shape_limits import check_together
from partitioner.capture.trace.transformers_hooks import APPEND, READ
from partitioner.capture.trace.weight_names import ModelWeights
from partitioner.errors import CaptureError
from partitioner.program.program import Input, Program, State
from partitioner.program.progress import timed
from partitioner.sharding.layout import REPLICATED
from partitioner.sharding.mesh import Mesh

__all__ = ["capture_piece", "capture_step", "states_found_once"]

SLOTS = 211
"""Slots in the example: a prime, and more than tokens, so that there are some before them."""
_CACHES = ("past_key_values", "cache_params")
"""The parameters of forward that take a transformers Cache."""
_DIMS = {"slots": ("slots",)}


def capture_step(model: PreTrainedModel, *, mesh: Mesh, max_length: int | None = None) -> Program:
    """Raises `CaptureError` where the model keeps what it remembers other than in a transformers Cache."""
    return _capture(model, mesh=mesh, max_length=max_length, several=False)


def capture_piece(model: PreTrainedModel, *, mesh: Mesh, max_length: int | None = None) -> Program:
    """The same for S tokens at once, whatever the model remembers."""
    return _capture(model, mesh=mesh, max_length=max_length, several=True)


@dataclass(frozen=True)
class _Stepped:
    """A fake model whose steps are traced, and what it remembers. longest: what its rotary embeddings are fixed for."""

    fake: FakeTensorMode
    model: PreTrainedModel
    known: ModelWeights
    notes: list[str]
    longest: int | None
    kept: _Kept


_Made = dict[tuple[int, int | None], tuple[PreTrainedModel, _Stepped]]
_made: ContextVar[_Made | None] = ContextVar("_made", default=None)
"""By the identity of the model, which is kept with it, and by what else it is made from."""


@contextlib.contextmanager
def states_found_once() -> Iterator[None]:
    """Within, what a model remembers is found once for its steps and its pieces. It must not be changed meanwhile."""
    token = _made.set({})
    try:
        yield
    finally:
        _made.reset(token)


def _stepped(model: PreTrainedModel, max_length: int | None) -> _Stepped:
    made = _made.get()
    if made is not None and (id(model), max_length) in made:
        return made[id(model), max_length][1]
    fake = FakeTensorMode()
    fake_model = make_fake_model(model, fake)
    known = ModelWeights(model)
    notes, longest = fix_rope(fake_model, known, max_length=max_length)
    _require_counting_from_zero(fake_model, fake, known)
    for config in configs(fake_model):
        config.use_cache = True
    found = _Stepped(fake, fake_model, known, notes, longest, _find_kept(fake_model, fake, known))
    if made is not None and found.kept.by_layer:  # elsewhere, a trace may leave something of its own
        made[id(model), max_length] = model, found
    return found


def _capture(model: PreTrainedModel, *, mesh: Mesh, max_length: int | None, several: bool) -> Program:
    stepped = _stepped(model, max_length)
    fake, fake_model, known, kept = stepped.fake, stepped.model, stepped.known, stepped.kept
    notes, longest, states = list(stepped.notes), stepped.longest, list(kept.states)
    recurrent = any(not state.per_token for state in states)
    single = recurrent and not several
    length = 1 if single else LENGTH
    example = _example(fake_model, length, positions=any(state.initial for state in states))
    kinds = _probe_masks(fake_model, kept, example, fake, known)
    symbols: dict[int, Any] = {0: Dim.DYNAMIC} if single else {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    dims = {name: {0: Dim.DYNAMIC} if name in _DIMS else symbols for name in example}

    apart = False

    def build(shared: SharedLayers | None) -> tuple[Builder, fx.Graph]:
        traced = _Stepping(fake_model, tuple(example), kept, shared, apart=apart)
        with timed("export" if shared is None else "export, identical layers once"), recurrences_installed(fake_model):
            exported = functionalize(export_step(traced, fake_model, example, kinds, dims, shared=shared))
        builder = Builder(exported, tuple(example), known.canonical.__getitem__, _DIMS, shared=shared)
        return builder, builder.build()

    try:
        (builder, graph), layers = (traced_once if kept.by_layer else traced_in_full)(fake_model, build)
        said = builder.limits()
    except CaptureError:
        if not single or any(state.per_token for state in states):
            raise
        apart = True  # its code for one token may be right for one sequence only
        (builder, graph), layers = traced_in_full(fake_model, build)
        said = builder.limits()
    notes += said
    check_together(builder.guards, builder.symbols, name=type(model).__name__)
    states, written = split_states(graph, states, builder.further)
    inputs = fold_steps(graph, kinds, states, tuple(written), builder.symbols)
    most = most_slots(graph, builder.symbols)
    if most is not None:
        low, high = builder.ranges.get("slots", (1, None))
        builder.ranges["slots"] = (low, most if high is None else min(high, most))
    weights, values = describe_weights(graph, builder, known)
    used = {str(node.kwargs["state"]) for node in graph.nodes if "state" in node.kwargs}
    kept_states = {
        s.name: State(s.name, s.shape, s.dtype, REPLICATED(len(s.shape)), per_token=s.per_token)
        for s in states
        if s.name in used
    }
    fold_recurrences(graph, kept_states, inputs["input_ids"])
    if single:
        builder.ranges["sequence"] = (1, 1)
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
        states=kept_states,
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
        kept: _Kept,
        shared: SharedLayers | None,
        *,
        apart: bool,
    ) -> None:
        super().__init__()
        self.model, self.shared, self.apart = model, shared, apart
        self.names, self.kept = names, kept

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        step = _step_cache(self.model, self.kept, given, given["input_ids"])
        if self.shared is not None:
            assert isinstance(step, StepCache)
            self.shared.cache, self.shared.append, self.shared.common = LayerStates(step), APPEND, ("slots",)
        rows = RowsApart(given["input_ids"].shape[0]) if self.apart else contextlib.nullcontext()
        with rows:
            output = self.model(**given, **{self.kept.parameter: step.cache}, use_cache=True)
        return (result_of(self.model, output), *step.written())


@dataclass(frozen=True)
class _Kept:
    """What the model remembers: in a cache that it takes as `parameter`, or in an object of its own like `example`."""

    parameter: str
    states: list[TracedState]
    example: Any = None

    @property
    def by_layer(self) -> bool:
        """Whether the layers of a transformers Cache hold all of it, so that one layer's trace tells of another."""
        return self.example is None and all(state.name.startswith("cache.") for state in self.states)


def _step_cache(model: PreTrainedModel, kept: _Kept, given: dict[str, Tensor], batch: Tensor) -> StepCache | StepObject:
    """Takes what the model does not out of its inputs; `batch` has as many rows as they."""
    slots, ids = given.pop("slots"), given["input_ids"]
    positions = given.get("position_ids")
    if positions is not None and "position_ids" not in inspect.signature(type(model).forward).parameters:
        del given["position_ids"]

    def read(state: TracedState, number: int) -> Tensor:
        held: Tensor = READ(batch, list(state.shape), state.dtype, number)
        if not state.initial or positions is None:
            return held
        begins = (positions[:, :1] == 0).reshape(-1, *(1 for _ in state.shape))
        return held.masked_fill(begins, state.initial)

    if kept.example is not None:
        return StepObject(
            kept.states,
            example=kept.example,
            read=read,
            other=lambda tensor: READ(batch, list(tensor.shape), tensor.dtype, -1)[0],
        )
    return StepCache(
        model,
        kept.states,
        past=slots.shape[0] - ids.shape[1],
        append=lambda x, number: APPEND(x, slots, number),
        read=read,
    )


def _find_kept(fake_model: PreTrainedModel, fake: FakeTensorMode, known: ModelWeights) -> _Kept:
    try:
        cache = _parameter(fake_model)
        return _Kept(cache, _find_states(fake_model, cache, fake, known))
    except CaptureError:
        inputs = _plain_inputs(fake_model, 1)
        run = functools.partial(probe, fake_model, {**inputs, "use_cache": True}, fake, known.indices())
        found = own_object(fake_model, run) if "use_cache" in _accepted(fake_model) else None
        if found is None or not (states := states_of_object(*found, batch=BATCH)):
            raise
        return _Kept(found[0], states, found[1])


def _accepted(fake_model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(fake_model).forward).parameters


def _parameter(fake_model: PreTrainedModel) -> str:
    accepted = _accepted(fake_model)
    found = next((name for name in _CACHES if name in accepted), None)
    if found is None or "input_ids" not in accepted:
        raise CaptureError(
            f"{type(fake_model).__name__} takes no transformers Cache: its forward takes {', '.join(accepted)}"
        )
    return found


def _require_counting_from_zero(fake_model: PreTrainedModel, fake: FakeTensorMode, known: ModelWeights) -> None:
    """Positions are given as 0, 1, 2 ...: a model that makes others of its tokens would be given wrong ones."""
    if "position_ids" not in _accepted(fake_model):
        return
    if "position_ids" not in choose_inputs(fake_model, fake, known.indices(), length=None).tensors:
        raise CaptureError(f"{type(fake_model).__name__} counts positions by a rule of its own, not 0, 1, 2 and so on")


def _example(fake_model: PreTrainedModel, length: int, *, positions: bool = False) -> dict[str, Tensor]:
    accepted = _accepted(fake_model)
    shape = (BATCH, length)
    found = {"input_ids": example_ids(fake_model, shape)}
    if positions or "position_ids" in accepted:
        found["position_ids"] = torch.arange(SLOTS - length, SLOTS).expand(shape).contiguous()
    found["slots"] = torch.arange(SLOTS)
    return found


def _plain_inputs(fake_model: PreTrainedModel, length: int) -> dict[str, Tensor]:
    """Of a text from its first token on."""
    inputs = {name: value for name, value in _example(fake_model, length).items() if name != "slots"}
    if "position_ids" in inputs:
        inputs["position_ids"] = torch.arange(length).expand(BATCH, length).contiguous()
    return inputs


def _find_states(
    fake_model: PreTrainedModel, cache: str, fake: FakeTensorMode, known: ModelWeights
) -> list[TracedState]:
    inputs = _plain_inputs(fake_model, LENGTH)

    def run(empty: Any) -> None:
        found = probe(fake_model, {**inputs, cache: empty, "use_cache": True}, fake, known.indices())
        _succeeded(fake_model, found)

    return find_states(fake_model, run, batch=BATCH)


def _probe_masks(
    fake_model: PreTrainedModel,
    kept: _Kept,
    example: dict[str, Tensor],
    fake: FakeTensorMode,
    known: ModelWeights,
) -> list[Any]:
    given = dict(example)
    past = SLOTS - given["input_ids"].shape[1]
    if "position_ids" not in _accepted(fake_model):  # what states hold does not matter here
        given.pop("position_ids", None)
    step = _step_cache(fake_model, kept, given, fake.from_tensor(given["input_ids"]))
    inputs = {**given, kept.parameter: step.cache, "use_cache": True}
    found = probe(fake_model, inputs, fake, known.indices(), offset=past)
    step.written()
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
