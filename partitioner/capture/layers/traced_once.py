"""A trace in which identical layers are traced once, or the full trace where that cannot be done; and which it was."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from torch import nn

from partitioner.capture.layers.share_layers import NotSharedError, SharedLayers, shares
from partitioner.program.program import LayersTraced

__all__ = ["traced_in_full", "traced_once"]

Built = TypeVar("Built")


def traced_once(
    model: nn.Module, build: Callable[[SharedLayers | None], Built], skipped: Collection[str] = ()
) -> tuple[Built, LayersTraced]:
    """`build` traces and builds a graph; with None, every layer. It raises `NotSharedError` where the other way
    fails. skipped: paths of layers that an earlier run of the model has shown to be like others.
    """
    shared = SharedLayers(model, skipped=skipped)
    count = len(shared.layers)
    if not shares():
        return build(None), LayersTraced(count, count, "every layer was asked for")
    if all(layer.members < shared.fewest for layer in shared.layers):
        return build(None), LayersTraced(count, count, f"no {shared.fewest} layers are alike")
    while True:
        try:
            found = build(shared)
            break
        except NotSharedError as error:
            if shared.hidden.missed:  # some weight was needed after all
                shared = SharedLayers(model, late=shared.late)
            elif shared.unified and not shared.late:  # the first layer was traced when less was known of the sizes
                shared = SharedLayers(model, late=True, skipped=skipped)
            else:
                return build(None), LayersTraced(count, count, str(error))
    reasons = [f"{path}: {why}" for path, why in shared.reasons.items()]
    return found, LayersTraced(count, count - shared.shared, "; ".join(reasons[:2]))


def traced_in_full(model: nn.Module, build: Callable[[SharedLayers | None], Built]) -> tuple[Built, LayersTraced]:
    """The same with every layer, of a model whose layers keep what a trace of another would not tell."""
    count = len(SharedLayers(model).layers)
    return build(None), LayersTraced(count, count, "layers keep states outside of a cache")
