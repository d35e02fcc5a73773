"""Hash-consed sets over tensors: every element of an id tensor names the set of weight indices it depends on.

    0          the empty set: the element is the same on every rank ("free")
    id > 0     an interned frozenset of labels

Id tensors are ordinary int64 tensors, so that data-movement ops run on them as themselves. Dims along which nothing
varies are kept as expanded (stride 0) views; merging and reducing work on the compact form.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Lattice", "compact"]


def compact(ids: Tensor) -> Tensor:
    """`ids` with every expanded dim narrowed to size 1."""
    for dim, (size, stride) in enumerate(zip(ids.shape, ids.stride(), strict=True)):
        if stride == 0 and size > 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


class Lattice:
    """Interned sets with union, element by element and along dims."""

    def __init__(self) -> None:
        self.sets: list[frozenset[int]] = [frozenset()]
        self._ids: dict[frozenset[int], int] = {frozenset(): 0}
        self._singletons: dict[int, int] = {}
        self._unions: dict[tuple[int, int], int] = {}

    def intern(self, labels: frozenset[int]) -> int:
        known = self._ids.get(labels)
        if known is None:
            known = self._ids[labels] = len(self.sets)
            self.sets.append(labels)
        return known

    def singletons(self, labels: range | list[int]) -> Tensor:
        """One set per label."""
        found = [self._singletons.get(label) for label in labels]
        for i, label in enumerate(labels):
            if found[i] is None:
                found[i] = self._singletons[label] = self.intern(frozenset((label,)))
        return torch.tensor(found, dtype=torch.int64)

    def _union(self, a: int, b: int) -> int:
        if a > b:
            a, b = b, a
        known = self._unions.get((a, b))
        if known is None:
            known = self._unions[a, b] = self.intern(self.sets[a] | self.sets[b])
        return known

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Element-wise union, with broadcasting."""
        shape = a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape)
        a, b = compact(a), compact(b)
        if not bool(a.any()):
            return b.expand(shape)
        if not bool(b.any()):
            return a.expand(shape)
        a, b = torch.broadcast_tensors(a, b)
        if torch.equal(a, b):
            return a.expand(shape)
        pairs, places = torch.unique(a * len(self.sets) + b, return_inverse=True)
        left, right = pairs // len(self.sets), pairs % len(self.sets)
        merged = torch.tensor([self._union(x, y) for x, y in zip(left.tolist(), right.tolist(), strict=True)])
        return merged[places].expand(shape)

    def reduce(self, ids: Tensor, dims: list[int]) -> Tensor:
        """Union along `dims`, which keep size 1."""
        for dim in dims:
            ids = ids.narrow(dim, 0, 1) if ids.stride(dim) == 0 and ids.shape[dim] else ids
            while ids.shape[dim] > 1:
                half, odd = divmod(ids.shape[dim], 2)
                rest = ids.narrow(dim, 2 * half, odd)
                ids = self.merge(ids.narrow(dim, 0, half), ids.narrow(dim, half, half))
                if odd:
                    ids = torch.cat([ids, rest], dim)
            if not ids.shape[dim]:
                ids = ids.new_zeros([1 if d == dim else size for d, size in enumerate(ids.shape)])
        return ids
