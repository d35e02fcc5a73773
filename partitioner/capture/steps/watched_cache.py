"""A cache that knows which layer asks for what: a layer that asks about itself alone can stand for others like it.

While a layer is traced, what it asks of the cache must carry its own number, in the form that tells of its uses
(`partitioner.capture.layers.layer_index`). Anything else that it asks (how long
the first layer's text is, say) is told.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from partitioner.capture.layers.layer_index import LayerIndex, plain

__all__ = ["WatchedCache", "WatchedLayers"]


class WatchedCache:
    """Goes before the class of a cache."""

    layers: Any

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        told = super().__getattribute__("__dict__").get("_told")
        if told is None or name.startswith("_") or name == "layers":
            return found
        if inspect.ismethod(found):
            return functools.partial(_asked, self, found)
        told(f"{name} of the cache")
        return found

    @contextlib.contextmanager
    def watched(self, number: int | None, told: Callable[[str], None]) -> Iterator[None]:
        """Within it, `told` hears of whatever is not asked for the layer of this number."""
        vars(self).update(_told=told, _number=number)
        try:
            yield
        finally:
            del vars(self)["_told"], vars(self)["_number"]


def _asked(cache: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    held = vars(cache)
    told = held["_told"]
    numbers = {plain(each) for each in (*args, *kwargs.values()) if type(each) is LayerIndex}
    if numbers != {held["_number"]}:
        told(f"{method.__name__} of the cache")
    held["_told"] = None  # what it asks in turn, it asks by itself
    try:
        return method(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
    finally:
        held["_told"] = told


class WatchedLayers(list[Any]):
    """The layers of a cache."""

    def __init__(self, cache: Any) -> None:
        super().__init__(cache.layers)
        self.cache = cache

    def __getitem__(self, index: Any) -> Any:
        told = vars(self.cache).get("_told")
        if told is not None and not (type(index) is LayerIndex and plain(index) == vars(self.cache)["_number"]):
            told("another layer of the cache")
        return super().__getitem__(plain(index))

    def __iter__(self) -> Iterator[Any]:
        told = vars(self.cache).get("_told")
        if told is not None:
            told("all layers of the cache")
        return super().__iter__()
