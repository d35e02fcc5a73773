"""States that a model keeps outside of a transformers Cache, found by what a run leaves behind.

    in modules     attributes that hold tensors after a run and did not before
    in an object   what the model makes for itself, returns, and takes back under the same name: a list of tensors, or
                   anything whose lists, dicts and attributes lead to tensors

What each was before the first token is what the run began with: such tensors are made without weights, so that a run
on fake weights still tells their numbers. Where these are not one and the same number, the state is not known.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Cache, PreTrainedModel

from partitioner.capture.trace.transformers_hooks import ONE_CAPTURE_AT_A_TIME

__all__ = ["Attributes", "filled_with", "leaves_of", "own_object", "rebuilt"]

_DEEPEST = 6


def filled_with(tensor: Tensor | None) -> float | None:
    """The number that a tensor holds everywhere; None: there are several, or they are not known."""
    if tensor is None or isinstance(tensor, FakeTensor) or not tensor.numel():
        return None
    first = tensor.reshape(-1)[0]
    return float(first) if bool((tensor == first).all()) else None


class Attributes:
    """Tensors in attributes of modules: which there are after a run, and what was first put there."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._paths = {module: path for path, module in self._modules.items()}
        self._before = set(self._held())
        self._first: dict[tuple[str, str], Tensor] = {}

    def _held(self) -> dict[tuple[str, str], Any]:
        return {
            (path, name): value
            for path, module in self._modules.items()
            for name, value in [*vars(module).items(), *module._buffers.items()]
            if isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and _has_tensors(value))
        }

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, it is seen what modules are given as attributes."""
        plain = nn.Module.__setattr__

        def watching(module: nn.Module, name: str, value: Any) -> None:
            if isinstance(value, Tensor) and module in self._paths:
                self._first.setdefault((self._paths[module], name), value)
            plain(module, name, value)

        with ONE_CAPTURE_AT_A_TIME:
            nn.Module.__setattr__ = watching  # type: ignore[method-assign,assignment]
            try:
                yield
            finally:
                nn.Module.__setattr__ = plain  # type: ignore[method-assign]

    def forget(self) -> bool:
        """Takes away what a watched run has put there, and what an earlier one had; whether there was anything."""
        for path, name in self._first:
            setattr(self._modules[path], name, None)
        found = bool(self._first)
        self._first = {}
        return found

    def new(self) -> dict[tuple[str, str], tuple[Any, float | None]]:
        """By path and name, what a run has left behind, and what it was filled with before the first token."""
        return {
            key: (value, filled_with(self._first.get(key)))
            for key, value in self._held().items()
            if key not in self._before or key in self._first
        }


def _has_tensors(value: Any) -> bool:
    return any(isinstance(item, Tensor) for item in value)


def own_object(model: PreTrainedModel, run: Callable[[], object]) -> tuple[str, Any] | None:
    """The parameter under which the model takes back what it returns of it, and that; None: there is none."""
    accepted, outputs = inspect.signature(type(model).forward).parameters, list[Any]()
    handle = model.register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        run()
    finally:
        handle.remove()
    fields = dict(outputs[-1]) if outputs and isinstance(outputs[-1], dict) else {}
    found = [
        (name, value)
        for name, value in fields.items()
        if name in accepted and not isinstance(value, (Tensor, Cache)) and any(True for _ in leaves_of(value))
    ]
    return found[0] if len(found) == 1 else None


def leaves_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The tensors that lists, tuples, dicts and attributes lead to."""
    if isinstance(value, Tensor):
        yield path, value
    elif len(path) < _DEEPEST:
        for name, item in _items(value):
            yield from leaves_of(item, (*path, str(name)))


def rebuilt(value: Any, leaf: Callable[[tuple[str, ...], Tensor], Tensor], path: tuple[str, ...] = ()) -> Any:
    """The same with other tensors, in lists, dicts and objects of its own."""
    if isinstance(value, Tensor):
        return leaf(path, value)
    items = dict(_items(value)) if len(path) < _DEEPEST else {}
    made = {name: rebuilt(item, leaf, (*path, str(name))) for name, item in items.items()}
    if isinstance(value, dict):
        return {**value, **made}
    if isinstance(value, (list, tuple)):
        return type(value)(made.values())
    if not items:
        return value
    found = copy.copy(value)
    vars(found).update(made)
    return found


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif isinstance(value, dict):
        yield from value.items()
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module, torch.dtype, torch.device)):
        # what leads nowhere, a configuration say, stays what it is
        yield from ((name, each) for name, each in vars(value).items() if any(True for _ in leaves_of(each, ("",))))
