"""Comparing in float64: whatever a model computes in less (all of it, or the detours through float32 inside norms,
softmaxes and rotary angles) computed in float64 instead.

A reduction that is done in parts adds in another order. In float32 that costs 1e-7, however precise the rest is; with
the detours lifted on both sides, what remains of a difference is an error and not rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from partitioner.program.program import Program, Value, Weight

__all__ = ["ExactArithmetic", "in_float64", "lifted"]


_LIFTED = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


def lifted(leaf: Any) -> Any:
    """A dtype of floating numbers as float64 (complex ones as complex128); all else as it is."""
    return _LIFTED.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


def _lifted_weight(weight: Weight) -> Weight:
    of = None if weight.of is None else _lifted_weight(weight.of)
    return replace(weight, dtype=lifted(weight.dtype), of=of)


class ExactArithmetic(TorchFunctionMode):
    """`with ExactArithmetic(): model(...)` runs a float64 model without going through anything less."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            return args[0].double()
        args, kwargs = tree_map(lifted, (args, kwargs or {}))
        return func(*args, **kwargs)


def in_float64(program: Program) -> Program:
    """A copy of a program in which all floating numbers are float64: casts, buffers, weights."""

    def value(found: Any) -> Any:
        if isinstance(found, Value):
            return replace(found, dtype=lifted(found.dtype))
        return tuple(map(value, found)) if isinstance(found, (tuple, list)) else found

    copy = program.copy()
    for node in copy.graph.nodes:
        node.meta["val"] = value(node.meta.get("val"))
        if node.op == "call_function":
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), lifted)
    copy.weights = {name: _lifted_weight(weight) for name, weight in copy.weights.items()}
    copy.states = {name: replace(state, dtype=lifted(state.dtype)) for name, state in copy.states.items()}
    copy.weight_data = {name: value.to(lifted(value.dtype)) for name, value in copy.weight_data.items()}
    return copy
