"""Reductions over a split row, written out as sums that each rank takes over its own part.

    mean(x)          sum(x) / n
    vector_norm(x)   sqrt(sum(x * x))
    layer_norm(x)    (x - m) * rsqrt(sum((x - m)^2) / n + eps) * weight + bias     m = sum(x) / n
    rms_norm(x)      x * rsqrt(sum(x^2) / n + eps) * weight

Each sum is one number per token, which an all-reduce completes. As in the fused kernels, norms are computed in
float32 where the input has fewer bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from partitioner.program.node_arguments import arguments, operation
from partitioner.program.program import Program, Value

aten = torch.ops.aten

__all__ = ["can_decompose", "decompose"]


def can_decompose(node: fx.Node) -> bool:
    """Whether `decompose` can write the node as sums."""
    op, a = operation(node), arguments(node)
    if op is aten.linalg_vector_norm:
        return a["ord"] in (None, 2, 2.0) and a["dim"] is not None
    return op in (aten.mean, aten.layer_norm) or (op is aten.rms_norm and a["eps"] is not None)


def decompose(program: Program, node: fx.Node) -> list[str]:
    """Replaces the node; returns the names of the sums."""
    a = arguments(node)
    writing = _Writing(program, node)
    op = operation(node)
    with program.graph.inserting_before(node):
        if op is aten.mean:
            found = writing.mean(a["self"], a["dim"], bool(a["keepdim"]), a["dtype"])
        elif op is aten.linalg_vector_norm:
            x = writing.wide(a["self"])
            total = writing.sum(writing(aten.mul.Tensor, x, x), a["dim"], bool(a["keepdim"]), a["dtype"])
            found = writing(aten.sqrt.default, total)
        else:
            found = writing.norm(a)
        found = writing.narrow(found)
    node.replace_all_uses_with(found)
    program.graph.erase_node(node)
    return writing.sums


class _Writing:
    """Puts ops before a node, with shapes and dtypes by broadcasting."""

    def __init__(self, program: Program, node: fx.Node) -> None:
        self.program, self.node = program, node
        self.sums: list[str] = []
        self.result: Value = node.meta["val"]

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        values = [v.meta["val"] for v in args if isinstance(v, fx.Node)]
        largest = max(values, key=lambda v: len(v.shape))
        shape = tuple(
            next((s for s in sizes if s != 1), 1)
            for sizes in zip(*(v.shape for v in values if len(v.shape) == len(largest.shape)), strict=True)
        )
        return self.put(target, args, kwargs, Value(shape, values[0].dtype))

    def put(self, target: Callable[..., Any], args: Any, kwargs: Any, value: Value) -> fx.Node:
        made = self.program.graph.call_function(target, tuple(args), kwargs)
        made.meta = {**self.node.meta, "val": value}
        return made

    def sum(self, x: fx.Node, dim: Any, keepdim: bool, dtype: Any = None) -> fx.Node:
        value: Value = x.meta["val"]
        dims = _dims(dim, len(value.shape))
        shape = tuple(1 if i in dims else s for i, s in enumerate(value.shape) if keepdim or i not in dims)
        made = self.put(aten.sum.dim_IntList, (x, dims, keepdim), {"dtype": dtype}, Value(shape, dtype or value.dtype))
        self.sums.append(made.name)
        return made

    def mean(self, x: fx.Node, dim: Any, keepdim: bool, dtype: Any = None) -> fx.Node:
        shape = x.meta["val"].shape
        count = math.prod(shape[d] for d in _dims(dim, len(shape)))
        return self(aten.div.Tensor, self.sum(x, dim, keepdim, dtype), count)

    def norm(self, a: dict[str, Any]) -> fx.Node:
        x = self.wide(a["input"])
        if operation(self.node) is aten.layer_norm:
            x = self(aten.sub.Tensor, x, self.mean(x, [-1], True))
        squares = self.mean(self(aten.mul.Tensor, x, x), [-1], True)
        scale = self(aten.rsqrt.default, self(aten.add.Tensor, squares, a["eps"]))
        y = self(aten.mul.Tensor, x, scale)
        if a.get("weight") is not None:
            y = self(aten.mul.Tensor, y, self.wide(a["weight"]))
        return self(aten.add.Tensor, y, self.wide(a["bias"])) if a.get("bias") is not None else y

    def wide(self, x: fx.Node) -> fx.Node:
        return self._cast(x, torch.float32) if x.meta["val"].dtype.itemsize < 4 else x

    def narrow(self, x: fx.Node) -> fx.Node:
        return self._cast(x, self.result.dtype)

    def _cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        value: Value = x.meta["val"]
        if value.dtype is dtype:
            return x
        return self.put(aten._to_copy.default, (x,), {"dtype": dtype}, Value(value.shape, dtype))


def _dims(dim: Any, rank: int) -> list[int]:
    given = range(rank) if dim in (None, []) else [dim] if isinstance(dim, int) else dim
    return sorted(d % rank for d in given)
