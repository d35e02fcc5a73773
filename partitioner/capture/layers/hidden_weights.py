"""Layers that are most likely not traced hold no weights during the trace: torch.export would prepare each of them.

    probe     layers 1 to 30 are alike layer 0, and were not run
    trace     their modules have no parameters and no buffers; the builder of the graph knows them by name

If the trace does need such a layer after all, it is made again with all weights in place (`traced_once.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn

from partitioner.capture.layers.layer_kinds import Layer

__all__ = ["HiddenWeights"]

_KINDS = ("_parameters", "_buffers")


class _Hidden(dict[str, Any]):
    """Holds nothing, and notes who asks for one of `names`: attributes that the module now seems not to have."""

    def __init__(self, names: Collection[str], missed: list[str]) -> None:
        super().__init__()
        self.names, self.missed = names, missed

    def __contains__(self, name: object) -> bool:
        if name in self.names:
            self.missed.append(str(name))
        return super().__contains__(name)


class HiddenWeights:
    """Of the layers of `model`; a module that stands elsewhere in it as well keeps its weights."""

    def __init__(self, model: nn.Module, layers: Collection[Layer]) -> None:
        self.missed: list[str] = []
        """What was asked for while it was hidden."""
        outside: set[int] = set()
        _reach(model, {id(layer.module) for layer in layers}, outside)
        self._held: dict[str, list[tuple[dict[str, Any], str, Any]]] = {}
        """By path of a layer: the attributes of a module, which of them, and what it is."""
        self.tensors: dict[str, Tensor] = {}
        """By name in the model."""
        for layer in layers:
            inside = [(p, module) for p, module in layer.module.named_modules() if id(module) not in outside]
            self._held[layer.path] = [
                (vars(module), kind, vars(module)[kind]) for _, module in inside for kind in _KINDS
            ]
            for below, module in inside:
                start = f"{layer.path}.{below}." if below else f"{layer.path}."
                for kind in _KINDS:
                    self.tensors |= {start + n: t for n, t in vars(module)[kind].items() if t is not None}

    def __contains__(self, path: str) -> bool:
        return path in self._held

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Within this context the layers hold no weights."""
        try:
            for path in self._held:
                self._hide(path)
            yield
        finally:
            for path in self._held:
                self._show(path)

    @contextlib.contextmanager
    def shown(self, path: str) -> Iterator[None]:
        """Within this context, inside the other, the layer holds them."""
        found = [attributes[kind] for attributes, kind, _ in self._held.get(path, ())]
        if not found or any(found):  # nothing is hidden, or something was put into the module meanwhile
            yield
            return
        self._show(path)
        try:
            yield
        finally:
            self._hide(path)

    def _hide(self, path: str) -> None:
        for attributes, kind, tensors in self._held[path]:
            attributes[kind] = _Hidden(tensors.keys(), self.missed)

    def _show(self, path: str) -> None:
        for attributes, kind, tensors in self._held[path]:
            attributes[kind] = tensors


def _reach(module: nn.Module, apart: set[int], found: set[int]) -> None:
    """Adds all modules that are reached other than through those of `apart`."""
    if id(module) in found or id(module) in apart:
        return
    found.add(id(module))
    for child in module.children():
        _reach(child, apart, found)
