"""During an eager run over fake weights, a layer of a known kind is not run: tensors of the right shapes stand for what
it returns.

Whatever a run of the model is to show (masks, look-ups, how tokens are counted) is seen in the first layer of a kind:
the others do the same with the same values. A layer that asks for a mask by itself is always run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from partitioner.capture.layers.layer_calls import Flat, NotComparableError
from partitioner.capture.layers.layer_kinds import Layer, signature_of
from partitioner.capture.layers.share_layers import SharedLayers, numbered, refused

__all__ = ["ProbedLayers"]


class ProbedLayers(SharedLayers):
    """The same for an eager run: a body is what a layer returned."""

    fewest, compares = 2, False  # the last of a kind is not run either

    def __init__(self, model: nn.Module, fake: FakeTensorMode, count_masks: Callable[[], int]) -> None:
        super().__init__(model)
        self.fake, self.count_masks = fake, count_masks
        self.skipped: set[str] = set()
        """Paths of the layers that were not run."""
        self._results: list[tuple[Flat, list[int | None]]] = []
        """What a layer returned, and by tensor which of those that it was given it is, if one."""

    def begin(self) -> None:
        super().begin()
        self._results = []

    def _trace(self, layer: Layer, own: Callable[..., Any], given: Flat, about: Any) -> int | None:
        before, masks = [tensor._version for tensor in given.tensors], self.count_masks()
        args, kwargs, _ = given.rebuild(given.tensors)
        reads: list[str] = []
        self._inside = True
        try:
            with numbered(layer, reads.append):
                self._result = own(*args, **kwargs)
                unchanged = signature_of(layer.module, layer.counts) == about
        finally:
            self._inside = False
        try:
            result = self._flat(self._result)
        except NotComparableError:
            return None
        places = [next((i for i, one in enumerate(given.tensors) if one is t), None) for t in result.tensors]
        made = [t for t, place in zip(result.tensors, places, strict=True) if place is None]
        if (
            refused(given, lambda: self._flat(args, kwargs, None), reads)
            or not unchanged
            or self.count_masks() != masks
            or [tensor._version for tensor in given.tensors] != before
            or not all(isinstance(tensor, FakeTensor) for tensor in made)
        ):
            return None
        self._results.append((result, places))
        return len(self._results) - 1

    def _skip(self, layer: Layer, given: Flat, body: int) -> Any:
        result, places = self._results[body]
        self.skipped.add(layer.path)

        def again(tensor: Tensor, place: int | None) -> Tensor:
            if place is not None:
                return given.tensors[place]
            with self.fake:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)

        return result.rebuild(list(map(again, result.tensors, places)))[0]
