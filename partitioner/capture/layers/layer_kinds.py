"""Which layers of a model are alike: the same modules, attributes and shapes, up to the layer's number.

A layer is a module of an outermost ModuleList. Its signature holds all that its forward can find in it: the classes of
its modules, their attributes by value, functions by their code, weights by shape, dtype and tie. An integer that counts
the layers (position in the list plus a constant, in all layers that have it) is left out; whether the code reads it is
seen when the layer is traced (`layer_index.py`). What cannot be compared makes a layer unlike all others.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["Layer", "digest", "find_layers", "outermost_lists", "signature_of"]

_TENSORS = ("_parameters", "_buffers")
_SEEN_ELSEWHERE = {*_TENSORS, "_modules"}
_PLAIN = (str, bytes, bool, complex, type(None), torch.dtype, torch.device, torch.Size, torch.layout)


@dataclass
class Layer:
    """path: its name in the model. counts: (path below it, attribute) of the integers that are its number.

    kind: equal for layers that are alike. members: how many there are of the kind. last: whether it is the last.
    """

    path: str
    module: nn.Module
    counts: tuple[tuple[str, str], ...]
    kind: Any
    members: int = 1
    last: bool = False
    number: int | None = None
    """The smallest of these integers, where there are any."""


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers of the outermost lists of modules, in their order."""
    found: list[Layer] = []
    for path, container in outermost_lists(model):
        own = [(f"{path}.{name}", module) for name, module in container.named_children()]
        counts = _counting([module for _, module in own])
        for full, module in own:
            held = {below: vars(inner) for below, inner in module.named_modules()}
            mine = tuple((below, name) for below, name in counts if name in held.get(below, {}))
            numbers = [held[below][name] for below, name in mine]
            kind = path, signature_of(module, mine)
            found.append(Layer(full, module, mine, kind, number=min(numbers, default=None)))
    members: dict[Any, list[Layer]] = defaultdict(list)
    for layer in found:
        members[layer.kind].append(layer)
    for alike in members.values():
        alike[-1].last = True
        for layer in alike:
            layer.members = len(alike)
    return found


def outermost_lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of modules that lie in no other list, with their names in the model."""
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList):
            yield full, child
        else:
            yield from outermost_lists(child, full)


def _counting(layers: list[nn.Module]) -> list[tuple[str, str]]:
    """The integers that are a layer's number, in all layers that have them."""
    values: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    values[path, name].append(value - position)
    return [place for place, starts in values.items() if len(starts) > 1 and len(set(starts)) == 1]


def signature_of(module: nn.Module, counts: tuple[tuple[str, str], ...]) -> Any:
    """All that a forward can find in a module, comparable; without the integers that `counts` names."""
    # a trace listens to whatever is asked of a tensor; these thousands of sizes and strides are not the model's code
    with torch._C.DisableTorchFunction():
        return _Describing(module, set(counts)).layer()


@dataclass
class _Describing:
    root: nn.Module
    counts: set[tuple[str, str]]
    tensors: dict[int, int] = field(default_factory=dict)
    objects: dict[int, Any] = field(default_factory=dict)
    modules: dict[int, str] = field(default_factory=dict)

    def layer(self) -> Any:
        # a module that stands in several places is one
        self.modules = {id(module): path for path, module in self.root.named_modules()}
        places = [(path, self.modules[id(module)]) for path, module in self.root.named_modules(remove_duplicate=False)]
        described = [self._module(path, module) for path, module in self.root.named_modules()]
        return tuple(places), tuple(described)

    def _module(self, path: str, module: nn.Module) -> Any:
        attributes = []
        for name, value in vars(module).items():
            if name not in _SEEN_ELSEWHERE:
                attributes.append((name, "number" if (path, name) in self.counts else self.value(value)))
        weights = [
            (kind, name, None if value is None else self._weight(value))
            for kind in _TENSORS
            for name, value in vars(module)[kind].items()
        ]
        return path, type(module), tuple(attributes), tuple(weights)

    def _weight(self, tensor: Tensor) -> Any:
        tie = self.tensors.setdefault(id(tensor), len(self.tensors))
        return type(tensor), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tie, digest(tensor)

    def value(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, _PLAIN):
            return kind, value
        if kind is int:
            return kind, value
        if kind is float:
            return kind, repr(value)
        if isinstance(value, (list, tuple)):
            return kind, tuple(map(self.value, value))
        if isinstance(value, dict):
            return kind, tuple((self.value(key), self.value(held)) for key, held in value.items())
        if isinstance(value, (set, frozenset)):
            return kind, frozenset(map(self.value, value))
        if isinstance(value, nn.Module):
            # one outside of the layer may change between its layers
            return "module", self.modules.get(id(value), _unlike())
        if isinstance(value, Tensor):
            return self._constant(value)
        if id(value) not in self.objects:
            self.objects[id(value)] = ("itself", len(self.objects))  # of an object that holds itself
            self.objects[id(value)] = self._object(value)
        return self.objects[id(value)]

    def _constant(self, tensor: Tensor) -> Any:
        return type(tensor), tuple(tensor.shape), tensor.dtype, tensor.device, digest(tensor) or _unlike()

    def _object(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            cells = tuple(self.value(_cell(cell)) for cell in value.__closure__ or ())
            defaults = self.value(value.__defaults__), self.value(value.__kwdefaults__)
            return "function", value.__code__, id(value.__globals__), cells, defaults, self.value(value.__dict__)
        if isinstance(value, types.MethodType):
            return "method", self.value(value.__func__), self.value(value.__self__)
        if isinstance(value, functools.partial):
            return "partial", self.value(value.func), self.value(value.args), self.value(value.keywords)
        if isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
            return "name", id(value)
        if type(value).__dictoffset__:
            return type(value), self.value(vars(value))
        return type(value), _unlike()


def digest(tensor: Tensor) -> bytes | None:
    """Of its values, where it has any."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return None
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(plain.numpy().tobytes(), digest_size=16).digest()


def _unlike() -> Any:
    """Equal to nothing: what cannot be compared."""
    return object()


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None
