"""Ops that only move data: they run as themselves on tensors of ids, so they need no rule of their own.

That covers fused QKV in any order, gate and up in one matrix, rotary halves and interleaved heads (see
docs/architecture.md). What a move does to local shapes is in `localise`; here is only which ops are moves, and how to
run one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from partitioner.program.node_arguments import operation
from runtime.ops.local import reorder

aten = torch.ops.aten

__all__ = ["IDENTITIES", "MOVES", "is_move", "run_move"]


def _view(x: Tensor, size: list[int]) -> Tensor:
    return x.reshape(size)


def _pad(x: Tensor, pad: list[int], value: Any = 0) -> Tensor:
    return torch.nn.functional.pad(x, pad, value=0)  # padding is the same on every rank


def _repeat_interleave(x: Tensor, repeats: int, dim: int | None = None, *, output_size: int | None = None) -> Tensor:
    return x.repeat_interleave(repeats, dim)


def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    return list(torch.split(x, size, dim))


IDENTITIES: set[Any] = {
    aten.alias,
    aten.clone,
    aten.contiguous,
    aten.detach,
    aten.detach_,
    aten.lift_fresh_copy,
    aten._to_copy,
    aten.to,
    aten.type_as,
    aten.dropout,
    aten.native_dropout,
}
"""Same elements in the same places, perhaps in another dtype."""

MOVES: dict[Any, Callable[..., Any]] = {
    aten.view: _view,
    aten.reshape: _view,
    aten._unsafe_view: _view,
    aten.permute: aten.permute,
    aten.transpose: aten.transpose,
    aten.t: aten.t,
    aten.mT: aten.mT,
    aten.numpy_T: aten.numpy_T,
    aten.movedim: aten.movedim,
    aten.swapaxes: aten.swapaxes,
    aten.unsqueeze: aten.unsqueeze,
    aten.squeeze: aten.squeeze,
    aten.flatten: aten.flatten,
    aten.unflatten: aten.unflatten,
    aten.slice: aten.slice,
    aten.narrow: aten.narrow,
    aten.select: aten.select,
    aten.split: _split,
    aten.split_with_sizes: aten.split_with_sizes,
    aten.chunk: aten.chunk,
    aten.unbind: aten.unbind,
    aten.cat: aten.cat,
    aten.stack: aten.stack,
    aten.expand: aten.expand,
    aten.view_as: lambda x, other: x.reshape(other.shape),
    aten.expand_as: lambda x, other: x.expand(other.shape),
    aten.repeat: aten.repeat,
    aten.tile: aten.tile,
    aten.repeat_interleave: _repeat_interleave,
    aten.flip: aten.flip,
    aten.roll: aten.roll,
    aten.unfold: aten.unfold,
    aten.diagonal: aten.diagonal,
    aten.constant_pad_nd: _pad,
    aten.pad: lambda x, pad, mode="constant", value=None: _pad(x, pad),
    aten.slice_scatter: aten.slice_scatter,
    aten.select_scatter: aten.select_scatter,
    operator.getitem: operator.getitem,
    reorder: reorder,
}


def is_move(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    op = operation(node)
    if op is aten.repeat_interleave and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return False  # repeats known only at run time
    if op is aten.pad and len(node.args) > 2 and node.args[2] != "constant":
        return False
    return op in MOVES or op in IDENTITIES


def run_move(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The move itself on `args` (tensors of ids in place of the node's tensors)."""
    op = operation(node)
    if op in IDENTITIES:
        return args[0]
    if op is aten.pad:
        return MOVES[op](*args[:2])
    return MOVES[op](*args, **kwargs)
