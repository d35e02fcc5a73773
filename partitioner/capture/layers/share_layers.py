"""During a trace, a layer of a known kind is one node: what it computes was traced from the first of its kind.

    first of a kind      enter(inputs) -> the layer's own ops -> leave(outputs)
    last of a kind       the same: both must come out equal
    those in between     block(inputs) -> outputs

The model around its layers runs in full, so that what they are given (masks, positions, what an earlier layer
returned) is what the model gives them. The builder of the graph puts a copy of the first layer's ops where a block is
(`stamp_layers.py`). A call is of a known kind if the layer is alike another (`layer_kinds.py`), its arguments are alike
(`layer_calls.py`), and the other's code neither read the layer's number, nor changed anything that it found.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from partitioner.capture.layers.hidden_weights import HiddenWeights
from partitioner.capture.layers.layer_calls import Flat, NotComparableError, flatten
from partitioner.capture.layers.layer_index import LayerIndex
from partitioner.capture.layers.layer_kinds import Layer, find_layers, signature_of

__all__ = [
    "BLOCK",
    "ENTER",
    "LEAVE",
    "NotSharedError",
    "SharedLayers",
    "every_layer",
    "numbered",
    "refused",
    "shares",
]

_library: Any = torch.library.Library("partitioner_layers", "DEF")  # type: ignore[no-untyped-call]
_library.define("enter(Tensor[] inputs, int body) -> Tensor[]")
_library.define("leave(Tensor[] outputs, int body) -> Tensor[]")
_library.define("block(Tensor[] inputs, int body, int call) -> Tensor[]")
_open: list[SharedLayers] = []
"""The sharing of the trace that is being made."""

_every_layer: ContextVar[bool] = ContextVar("every_layer", default=False)


@contextlib.contextmanager
def every_layer() -> Iterator[None]:
    """Within this context every layer is traced: what traces with shared layers are compared with."""
    token = _every_layer.set(True)
    try:
        yield
    finally:
        _every_layer.reset(token)


def shares() -> bool:
    """Whether layers may be traced once, in this context."""
    return not _every_layer.get()


class NotSharedError(Exception):
    """The trace with shared layers is not to be used; the message says why. Without sharing it may be made."""


class CacheState(Protocol):
    """A cache that layers are given, by the number of a layer: what it holds for the layer, and who asked for it."""

    cache: object

    def held(self, number: int | None) -> Any:
        """What the cache holds for the layer: tensors and plain values, in dicts and tuples."""

    def hold(self, number: int | None, held: Any) -> None: ...

    def watched(self, number: int | None, read: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
        """Within it, `read` is told of whatever is asked of the cache about other layers."""

    def part_of(self, number: int | None, state: int) -> str | None:
        """Which part of what the layer keeps the state is; None: it is another layer's."""

    def state_of(self, number: int | None, part: str) -> int: ...


@dataclass
class Traced:
    """A call that was traced in full. calls: the layers that it stands for, by number of the call."""

    layer: Layer
    result: Flat | None = None
    calls: dict[int, Layer] = field(default_factory=dict)
    same_as: int | None = None
    """The body that this one must equal."""


class SharedLayers:
    """One for each trace: `wrapped` replaces the forwards of the layers of `model`, which is a copy of the user's."""

    fewest = 3
    """Layers of a kind from which one is left out: the first and the last are traced."""
    compares = True
    """Whether the last of a kind is traced too, to be compared with the first."""

    def __init__(self, model: nn.Module, *, late: bool = False, skipped: Collection[str] = ()) -> None:
        """skipped: paths of layers that need no trace, by all that is known."""
        self.model = model
        self.late, self.unified = late, False
        """Whether a layer in which two sizes turn out to be one stands for no other; whether there was such a layer."""
        self.cache: CacheState | None = None
        """Of the step that is traced, where one is."""
        self.append: Any = None
        """The op that adds to a state of a cache, whose number is its last argument."""
        self.common: tuple[str, ...] = ()
        """The inputs that this op reads behind a layer's back."""
        self.layers = find_layers(model)
        self.reasons: dict[str, str] = {}
        """By path of a layer: why it is traced in full, where another one is alike."""
        self.bodies: list[Traced] = []
        self.tensors = {
            name: id(tensor)
            for found in (model.named_parameters, model.named_buffers)
            for name, tensor in found(remove_duplicate=False)
        }
        """All parameters and buffers by name; equal numbers are one tensor."""
        self.hidden = HiddenWeights(model, [each for each in self.layers if each.path in skipped and not each.last])
        self._known: dict[Any, int | None] = {}
        self._calls = 0
        self._inside = False
        self.count_masks: Callable[[], int] = lambda: 0

    @contextlib.contextmanager
    def wrapped(self) -> Iterator[None]:
        wanted = [
            layer for layer in self.layers if layer.members >= self.fewest and "forward" not in vars(layer.module)
        ]
        wanted = wanted if shares() else []
        self.begin()
        _open.append(self)
        try:
            for layer in wanted:
                self._wrap(layer)
            with self.hidden.hidden():
                yield
            if self.hidden.missed:
                raise NotSharedError(f"{self.hidden.missed[0]} is read from outside of its layer")
        finally:
            _open.pop()
            for layer in wanted:
                vars(layer.module).pop("forward", None)

    def begin(self) -> None:
        """The trace starts (again)."""
        self.bodies, self._known, self._calls, self._inside = [], {}, 0, False

    @property
    def shared(self) -> int:
        """How many layers were not traced."""
        return sum(len(body.calls) for body in self.bodies)

    def _wrap(self, layer: Layer) -> None:
        own = layer.module.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            del vars(layer.module)["forward"]
            try:
                return self._call(layer, own, args, kwargs)
            finally:
                vars(layer.module)["forward"] = forward

        vars(layer.module)["forward"] = forward

    def _call(self, layer: Layer, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._inside:
            return own(*args, **kwargs)
        try:
            given = self._flat(args, kwargs, self._held(layer))
        except NotComparableError as error:
            self.reasons[layer.path] = f"it is given {error}"
            return own(*args, **kwargs)
        # as it is now: what it holds may have changed since the trace began
        with self.hidden.shown(layer.path):
            about = signature_of(layer.module, layer.counts)
        key = layer.kind[0], about, given.signature
        if layer.path in self.hidden and self._known.get(key) is None:
            self.hidden.missed.append(layer.path)
            raise NotSharedError(f"{layer.path} is to be traced, and its weights are hidden")
        if key not in self._known:
            self._known[key] = self._trace(layer, own, given, about)
            # sizes that were two when the layer was called may be one by now
            later = layer.kind[0], about, given.signature
            self.unified |= later != key
            if not self.late:
                self._known[later] = self._known[key]
            return self._result
        body = self._known[key]
        if body is None:
            return own(*args, **kwargs)
        if self._again(layer, own, given, about, body):
            return self._result
        return self._skip(layer, given, body)

    def _flat(self, *values: Any) -> Flat:
        return flatten(values, None if self.cache is None else self.cache.cache)

    def _held(self, layer: Layer) -> Any:
        return None if self.cache is None else self.cache.held(layer.number)

    def _hold(self, layer: Layer, held: Any) -> None:
        if self.cache is not None:
            self.cache.hold(layer.number, held)

    def _again(self, layer: Layer, own: Callable[..., Any], given: Flat, about: Any, body: int) -> bool:
        """Whether the layer was traced although it is known."""
        if not (self.compares and layer.last):
            return False
        again = self._trace(layer, own, given, about)
        if again is not None:
            self.bodies[again].same_as = body
        return True

    def _skip(self, layer: Layer, given: Flat, body: int) -> Any:
        traced = self.bodies[body]
        call, self._calls = self._calls, self._calls + 1
        traced.calls[call] = layer
        assert traced.result is not None
        found = torch.ops.partitioner_layers.block(given.tensors, body, call)
        result, held = traced.result.rebuild(list(found))
        self._hold(layer, held)
        return result

    def _trace(self, layer: Layer, own: Callable[..., Any], given: Flat, about: Any) -> int | None:
        """Sets `_result`; the number of the body, None where no other layer can be this one again."""
        number = len(self.bodies)
        self.bodies.append(Traced(layer))
        entered = list(torch.ops.partitioner_layers.enter(given.tensors, number))
        args, kwargs, held = given.rebuild(entered)
        self._hold(layer, held)
        # what the cache holds may be written to: it is handed on as it is afterwards
        start = self._flat(args, kwargs)
        before, masks = [tensor._version for tensor in start.tensors], self.count_masks()
        reads: list[str] = []
        self._inside = True
        try:
            with numbered(layer, reads.append), self._watched(layer, reads.append):
                result = own(*args, **kwargs)
            unchanged = signature_of(layer.module, layer.counts) == about
        finally:
            self._inside = False
        why = refused(start, lambda: self._flat(args, kwargs), reads)
        if [tensor._version for tensor in start.tensors] != before:
            raise NotSharedError(f"{layer.path} writes to what it is given")
        if not unchanged:
            why = "it changes what it holds"
        if self.count_masks() != masks:
            why = "it makes a mask by itself"
        try:
            flat = self._flat(result, self._held(layer))
        except NotComparableError as error:
            raise NotSharedError(f"{layer.path} returns {error}") from error
        memory = {tensor.untyped_storage()._cdata for tensor in entered}
        own_ids = set(map(id, entered))
        if any(t.untyped_storage()._cdata in memory and id(t) not in own_ids for t in flat.tensors):
            raise NotSharedError(f"{layer.path} returns a view of what it is given")
        left = list(torch.ops.partitioner_layers.leave(flat.tensors, number))
        flat.tensors = [tensor.detach() for tensor in left]
        self.bodies[number].result = flat
        self._result, held = flat.rebuild(left)
        self._hold(layer, held)
        if why is not None:
            self.reasons[layer.path] = why
        return None if why is not None else number

    def _watched(self, layer: Layer, read: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.cache is None else self.cache.watched(layer.number, read)


def refused(start: Flat, now: Callable[[], Flat], reads: list[str]) -> str | None:
    """Why a layer that was traced cannot stand for others; `start`: what it was given, `now`: what that is now."""
    if reads:
        return f"its code reads the layer's number ({reads[0]})"
    try:
        after = now()
    except NotComparableError as error:
        return f"it puts {error} into what it is given"
    # the trace may have found out meanwhile that two sizes are one
    if after.structure != start.structure or list(map(id, after.tensors)) != list(map(id, start.tensors)):
        return "it changes what it is given"
    return None


@contextlib.contextmanager
def numbered(layer: Layer, read: Callable[[str], None]) -> Iterator[None]:
    """The integers that are the layer's number tell when they are used."""
    owners = [(layer.module.get_submodule(path), name) for path, name in layer.counts]
    before = [vars(owner)[name] for owner, name in owners]
    try:
        for (owner, name), value in zip(owners, before, strict=True):
            vars(owner)[name] = LayerIndex(value, read)
        yield
    finally:
        for (owner, name), value in zip(owners, before, strict=True):
            vars(owner)[name] = value


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _same(tensors: list[Tensor], body: int) -> list[Tensor]:
    return [_like(tensor) for tensor in tensors]


def _outputs(inputs: list[Tensor], body: int, call: int) -> list[Tensor]:
    result = _open[-1].bodies[body].result
    assert result is not None
    return [_like(tensor) for tensor in result.tensors]


_register: Any = torch.library.register_fake
_register("partitioner_layers::enter", _same)
_register("partitioner_layers::leave", _same)
_register("partitioner_layers::block", _outputs)

ENTER = torch.ops.partitioner_layers.enter.default
LEAVE = torch.ops.partitioner_layers.leave.default
BLOCK = torch.ops.partitioner_layers.block.default
