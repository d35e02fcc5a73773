"""A trace in which identical layers are traced once, or the full trace where that cannot be done; and which it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from partitioner.capture.layers.share_layers import FEWEST, NotSharedError, SharedLayers, shares
from partitioner.program.program import LayersTraced

__all__ = ["traced_once"]

Built = TypeVar("Built")


def traced_once(model: nn.Module, build: Callable[[SharedLayers | None], Built]) -> tuple[Built, LayersTraced]:
    """`build` traces and builds a graph; with None, every layer. It raises `NotSharedError` where the other way
    fails.
    """
    shared = SharedLayers(model)
    count = len(shared.layers)
    if not shares():
        return build(None), LayersTraced(count, count, "every layer was asked for")
    if all(layer.members < FEWEST for layer in shared.layers):
        return build(None), LayersTraced(count, count, f"no {FEWEST} layers are alike")
    try:
        try:
            found = build(shared)
        except NotSharedError:
            if not shared.unified:
                raise
            # the first layer was traced when less was known of the sizes
            shared = SharedLayers(model, late=True)
            found = build(shared)
    except NotSharedError as error:
        return build(None), LayersTraced(count, count, str(error))
    reasons = [f"{path}: {why}" for path, why in shared.reasons.items()]
    return found, LayersTraced(count, count - shared.shared, "; ".join(reasons[:2]))
