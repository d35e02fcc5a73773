"""What the cache of a traced step holds for one layer, handed to the layer and taken back as any other tensor is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from partitioner.capture.steps.traced_cache import StepCache

__all__ = ["LayerStates"]

_STEP = "_step"


class LayerStates:
    """See `partitioner.capture.layers.share_layers.CacheState`."""

    def __init__(self, step: StepCache) -> None:
        self.cache: Any = step.cache
        self.states = step.states
        self._numbers = {(state.layer, state.part): number for number, state in enumerate(step.states)}

    def held(self, number: int | None) -> Any:
        layer = self._layer(number)
        if layer is None:
            return None
        held = {name: value for name, value in vars(layer).items() if name != _STEP}
        step = vars(layer).get(_STEP)
        counted = None if step is None else (tuple(step.numbers), step.past, step.added, step.taken)
        return type(layer).__qualname__, held, counted

    def hold(self, number: int | None, held: Any) -> None:
        layer = self._layer(number)
        if layer is None:
            return
        _, values, counted = held
        vars(layer).update(values)
        if counted is not None:
            _, layer._step.past, layer._step.added, layer._step.taken = counted

    def watched(self, number: int | None, read: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
        found: contextlib.AbstractContextManager[None] = self.cache.watched(number, read)
        return found

    def part_of(self, number: int | None, state: int) -> str | None:
        found = self.states[state]
        return found.part if found.layer == number else None

    def state_of(self, number: int | None, part: str) -> int:
        assert number is not None
        return self._numbers[number, part]

    def _layer(self, number: int | None) -> Any:
        layers = self.cache.layers
        return layers[number] if number is not None and 0 <= number < len(layers) else None
