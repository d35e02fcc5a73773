"""Hash-consed sets over tensors: every element of an id tensor names the set of weight indices it depends on.

    0                    the empty set: the element is the same on every rank ("free")
    1 + label            the set of one label; labels are numbered from 0
    _COMPOSITE + i       an interned set of several labels

A large set that a reduction yields (a head, a whole row) is given a *group* label that stands for its members, and
absorbs them when they meet it again. So sets stay small, however often what depends on a whole row is merged with a
whole row.

Id tensors are ordinary int64 tensors, so that data-movement ops run on them as themselves. Dims along which nothing
varies are kept as expanded (stride 0) views; merging and reducing work on the compact form. A value that depends on one
set by its head and on another by its state index is kept as two tensors (`Ids.terms`), not as all pairs of sets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ids", "Lattice", "compact", "expanded"]

_GROUP = 1 << 29
"""Labels from here on are groups."""
_COMPOSITE = 1 << 30
_LARGE = 24
_MANY = 8
"""Groups of which it takes too long to compare each with each."""


def compact(ids: Tensor) -> Tensor:
    """`ids` with every expanded dim narrowed to size 1."""
    for dim, (size, stride) in enumerate(zip(ids.shape, ids.stride(), strict=True)):
        if stride == 0 and size > 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


def expanded(ids: Tensor) -> Tensor:
    """`ids` with every dim along which nothing varies expanded: what moves them may have written them out."""
    for dim, (size, stride) in enumerate(zip(ids.shape, ids.stride(), strict=True)):
        if stride != 0 and size > 1:
            first, last = ids.narrow(dim, 0, 1), ids.narrow(dim, size - 1, 1)
            if torch.equal(first, last) and torch.equal(ids, first.expand_as(ids)):
                ids = first.expand_as(ids)
    return ids


@dataclass(frozen=True)
class Ids:
    """Each element's set is the union over `terms`: tensors of ids of one shape, at least one."""

    terms: tuple[Tensor, ...]

    @property
    def shape(self) -> torch.Size:
        return self.terms[0].shape

    @property
    def varying(self) -> list[int]:
        """Dims along which some term varies."""
        return sorted(set().union(*map(_varying, self.terms)))

    @property
    def distinct(self) -> int:
        """How many different sets there are, at least."""
        return max(int((torch.unique(compact(term)) != 0).sum()) for term in self.terms)

    def each(self, function: Callable[[Tensor], Tensor]) -> Ids:
        return Ids(tuple(map(function, self.terms)))


def _varying(ids: Tensor) -> set[int]:
    return {dim for dim, size in enumerate(compact(ids).shape) if size > 1}


class Lattice:
    """Interned sets with union, element by element and along dims."""

    def __init__(self) -> None:
        self._sets: list[frozenset[int]] = []
        self._ids: dict[frozenset[int], int] = {}
        self._unions: dict[tuple[int, int], int] = {}
        self._reduced: dict[frozenset[int], int] = {}
        self._members: list[frozenset[int]] = []
        self._groups: dict[frozenset[int], int] = {}

    def labels(self, identity: int) -> frozenset[int]:
        """The labels of a set, groups unexpanded."""
        if identity == 0:
            return frozenset()
        return self._sets[identity - _COMPOSITE] if identity >= _COMPOSITE else frozenset((identity - 1,))

    def members(self, label: int) -> frozenset[int]:
        """The labels that a label stands for: itself, or a group's members."""
        return self._members[label - _GROUP] if label >= _GROUP else frozenset((label,))

    @staticmethod
    def singletons(labels: Tensor) -> Tensor:
        """One set per label."""
        return labels + 1

    def _intern(self, labels: frozenset[int]) -> int:
        if len(labels) <= 1:
            return next(iter(labels)) + 1 if labels else 0
        known = self._ids.get(labels)
        if known is None:
            known = self._ids[labels] = _COMPOSITE + len(self._sets)
            self._sets.append(labels)
        return known

    def _union(self, a: int, b: int) -> int:
        if a > b:
            a, b = b, a
        if a in (0, b):
            return b
        known = self._unions.get((a, b))
        if known is None:
            both = frozenset((a - 1, b - 1)) if b <= _GROUP else self._absorbed(self.labels(a) | self.labels(b))
            known = self._unions[a, b] = self._intern(both)
        return known

    def _unions_of(self, left: list[int], right: list[int]) -> list[int]:
        """Pair by pair. Most often all are single labels, tens of thousands of them: these are not looked up twice."""
        found = []
        for a, b in zip(left, right, strict=True):
            if a == b or not (0 < a <= _GROUP and 0 < b <= _GROUP):
                found.append(self._union(a, b))
                continue
            labels = frozenset((a - 1, b - 1))
            known = self._ids.get(labels)
            found.append(self._intern(labels) if known is None else known)
        return found

    def _absorbed(self, labels: frozenset[int]) -> frozenset[int]:
        """Without what a group among them stands for already."""
        if not labels or max(labels) < _GROUP:
            return labels
        groups = [label for label in labels if label >= _GROUP]
        if len(groups) == 1:
            inside = self.members(groups[0])
            return frozenset(label for label in labels if label not in inside)
        groups.sort(key=lambda group: (-len(self.members(group)), group))  # the larger, which may stand for others
        if len(groups) > _MANY:
            kept, covered = self._largest(groups)
        else:
            kept = []
            for group in groups:
                if not any(self.members(group) <= self.members(other) for other in kept):
                    kept.append(group)
            plain = (label for label in labels if label < _GROUP)
            covered = {label for label in plain if any(label in self.members(group) for group in kept)}
        return frozenset(kept).union(label for label in labels if label < _GROUP and label not in covered)

    def _largest(self, groups: list[int]) -> tuple[list[int], Collection[int]]:
        """Those of many that no other contains, given the larger first; and all that they stand for."""
        kept: list[int] = []
        holders: dict[int, list[int]] = {}
        for group in groups:
            inside = self.members(group)
            if all(label in holders for label in inside):
                rarest = min(inside, key=lambda label: len(holders[label]))
                if any(inside <= self.members(other) for other in holders[rarest]):
                    continue
            kept.append(group)
            for label in inside:
                holders.setdefault(label, []).append(group)
        return kept, holders

    def join(self, *given: Ids | None) -> Ids | None:
        """Element-wise union of values of one shape; None is free, and so is the result if it is None."""
        found: list[Tensor] = []
        for term in (term for ids in given if ids is not None for term in ids.terms):
            if not bool(compact(term).any()):
                continue
            varying = _varying(term)
            for other in list(found):
                if _varying(other) <= varying or varying <= _varying(other):
                    found = [kept for kept in found if kept is not other]
                    term = self.merge(other, term)
                    varying = _varying(term)
            found.append(term)
        return Ids(tuple(found)) if found else None

    def union(self, ids: Ids, dims: list[int]) -> Ids | None:
        """Union along `dims`, which keep size 1; large sets become groups."""
        return self.join(*(Ids((self.reduce(term, dims),)) for term in ids.terms))

    def vector(self, ids: Ids, dim: int) -> Tensor | None:
        """Ids along `dim`, if nothing varies along another dim."""
        if any(other != dim for other in ids.varying):
            return None
        total = torch.zeros(ids.shape[dim], dtype=torch.int64)
        for term in ids.terms:
            total = self.merge(total, compact(term).reshape(-1).expand(ids.shape[dim]))
        return total

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Element-wise union, with broadcasting."""
        shape = a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        a, b = compact(a), compact(b)
        if not bool(a.any()):
            return b.expand(shape)
        if not bool(b.any()):
            return a.expand(shape)
        a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
        if torch.equal(a, b):
            return a.expand(shape)
        pairs, places = torch.unique((a << 31) + b, return_inverse=True)
        left, right = pairs >> 31, pairs & ((1 << 31) - 1)
        merged = torch.tensor(self._unions_of(left.tolist(), right.tolist()))
        return merged[places].expand(shape)

    def reduce(self, ids: Tensor, dims: list[int]) -> Tensor:
        """Union along `dims`, which keep size 1; large sets become groups."""
        kept_shape = [1 if dim in dims else size for dim, size in enumerate(ids.shape)]
        if all(ids.shape[dim] == 1 for dim in dims):
            return ids
        if 0 in ids.shape:
            return ids.new_zeros(kept_shape)
        small = compact(ids)
        kept = [dim for dim in range(ids.ndim) if dim not in dims]
        rows = small.permute([*kept, *dims]).reshape([*(small.shape[dim] for dim in kept), -1])
        found = [self._union_of(frozenset(row)) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
        merged = torch.tensor(found, dtype=torch.int64)
        return merged.view([1 if dim in dims else small.shape[dim] for dim in range(ids.ndim)]).expand(kept_shape)

    def _union_of(self, identities: frozenset[int]) -> int:
        known = self._reduced.get(identities)
        if known is None:
            single = (i - 1 for i in identities if 0 < i < _COMPOSITE)
            labels = frozenset(single).union(*(self.labels(i) for i in identities if i >= _COMPOSITE))
            known = self._reduced[identities] = self._as_group(self._intern(self._absorbed(labels)))
        return known

    def _as_group(self, identity: int) -> int:
        labels = self.labels(identity)
        if len(labels) <= _LARGE:
            return identity
        if labels not in self._groups:
            self._groups[labels] = _GROUP + len(self._members)
            plain = labels if max(labels) < _GROUP else frozenset().union(*map(self.members, labels))
            self._members.append(plain)
        return self._groups[labels] + 1
