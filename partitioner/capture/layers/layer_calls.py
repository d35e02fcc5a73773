"""What a layer is called with and what it returns: tensors apart from the rest, and the rest comparable.

    layer(hidden, position_embeddings=(cos, sin), cache=None)   ->   [hidden, cos, sin], signature

Two calls of one signature differ in nothing but which tensors they are given. A tensor that is given twice counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from partitioner.capture.layers.layer_kinds import digest

__all__ = ["Flat", "NotComparableError", "flatten", "shape_of"]


class NotComparableError(Exception):
    """The call hands over something whose meaning cannot be told from its value."""


@dataclass
class Flat:
    """tensors: each once. leaves: (place in `tensors`, True) or (value, False), as `spec` orders them."""

    tensors: list[Tensor]
    leaves: list[tuple[Any, bool]]
    spec: Any
    structure: Any

    @property
    def signature(self) -> Any:
        """Equal for calls that differ in nothing but which tensors they are given."""
        with torch._C.DisableTorchFunction():  # as in `signature_of`
            return self.structure, tuple(map(shape_of, self.tensors))

    def rebuild(self, tensors: list[Tensor]) -> Any:
        """The same with other tensors."""
        leaves = [tensors[leaf] if is_tensor else leaf for leaf, is_tensor in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


def flatten(value: Any, cache: object = None) -> Flat:
    """Raises `NotComparableError`. cache: an object that may be among what is given, and whose state is compared apart
    from it.
    """
    found, spec = pytree.tree_flatten(value)
    places: dict[int, int] = {}
    tensors: list[Tensor] = []
    leaves: list[tuple[Any, bool]] = []
    signature: list[Any] = []
    for leaf in found:
        if isinstance(leaf, Tensor):
            if id(leaf) not in places:
                places[id(leaf)] = len(tensors)
                tensors.append(leaf)
            leaves.append((places[id(leaf)], True))
            signature.append(("tensor", places[id(leaf)]))
        else:
            leaves.append((leaf, False))
            signature.append("cache" if leaf is cache and cache is not None else _described(leaf))
    return Flat(tensors, leaves, spec, (repr(spec), tuple(signature)))


def shape_of(tensor: Tensor) -> Any:
    """Sizes and strides as expressions of the trace's symbols, dtype and the like; values, of one that is not fake."""
    if tensor.layout is not torch.strided:
        raise NotComparableError(f"a tensor with the layout {tensor.layout}")
    sizes = tuple(map(_size, tensor.shape)), tuple(map(_size, tensor.stride()))
    flags = tensor.requires_grad, isinstance(tensor, nn.Parameter)
    return type(tensor), *sizes, tensor.dtype, str(tensor.device), *flags, digest(tensor)


def _size(size: Any) -> Any:
    return size if type(size) is int else ("symbolic", size.node.expr)


_PLAIN = (str, bytes, bool, int, type(None), torch.dtype, torch.device)


def _described(leaf: Any) -> Any:
    if isinstance(leaf, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return type(leaf), leaf.node.expr
    if type(leaf) in _PLAIN:
        return type(leaf), leaf
    if type(leaf) is float:
        return float, repr(leaf)
    raise NotComparableError(f"a {type(leaf).__name__}")
