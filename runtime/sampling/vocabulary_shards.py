"""A rank's share of the vocabulary: every index belongs to exactly one of the ranks that hold it.

    owned    what each coordinate holds: uneven, in several intervals, some indices on several ranks
    shares   disjoint and complete; indices that several ranks hold are cut evenly among them

With shares, copies of a row can neither count twice nor be compared with each other, and a vocabulary that every rank
holds whole is still searched in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from partitioner.errors import LayoutError, SamplingError
from partitioner.sharding.index_set import IndexSet

__all__ = ["Share", "shares"]


def shares(owned: Sequence[IndexSet], vocab_size: int) -> list[IndexSet]:
    """See the module's docstring."""
    cuts = sorted({0, vocab_size, *(end for held in owned for interval in held.intervals for end in interval)})
    parts: list[list[tuple[int, int]]] = [[] for _ in owned]
    for start, stop in pairwise(cuts):
        holders = [coordinate for coordinate, held in enumerate(owned) if start in held]
        if not holders or stop > vocab_size:
            raise LayoutError(
                f"the ranks together must hold the vocabulary 0:{vocab_size}, each index on one of them at least; "
                + (f"{start}:{stop} lies outside" if holders else f"nobody holds {start}:{stop}")
            )
        for i, holder in enumerate(holders):
            low, high = (start + (stop - start) * j // len(holders) for j in (i, i + 1))
            part = parts[holder]
            if part and part[-1][1] == low:
                part[-1] = (part[-1][0], high)
            elif low < high:
                part.append((low, high))
    return [IndexSet(tuple(part)) for part in parts]


class Share:
    """The part of a rank's logits [B, owned] that is its own to search, with the tokens that they stand for."""

    def __init__(self, owned: IndexSet, share: IndexSet, *, vocab_size: int, device: torch.device) -> None:
        self.size, self._num_held = share.size, owned.size
        self._vocab_size = vocab_size
        held, tokens = _indices(owned, device), _indices(share, device)
        self.tokens = tokens if share.size else torch.tensor([vocab_size], device=device)
        """[n] ascending token ids; one that does not exist where the share is empty, so that n is never 0."""
        self._columns = torch.searchsorted(held, tokens)
        self._start = int(self._columns[0]) if share.size else 0
        self._adjacent = share.size > 0 and int(self._columns[-1]) - self._start + 1 == share.size
        self._column_of: Tensor | None = None
        self._is_all = share == IndexSet.range(0, vocab_size)

    def of(self, logits: Tensor) -> Tensor:
        """The share's columns [B, n]; a single one of -inf where it is empty. SamplingError: not this rank's logits."""
        if logits.dim() != 2 or logits.shape[1] != self._num_held:
            raise SamplingError(f"logits must be [batch, {self._num_held}] on this rank, got {list(logits.shape)}")
        if not self.size:
            return logits.new_full((logits.shape[0], 1), -torch.inf)
        if self.size == logits.shape[1]:
            return logits
        if self._adjacent:
            return logits.narrow(1, self._start, self.size)
        return logits.index_select(1, self._columns)

    def tokens_at(self, columns: Tensor) -> Tensor:
        """What `columns` [B] of the share stand for."""
        return columns if self._is_all else self.tokens.index_select(0, columns)

    def locate(self, tokens: Tensor) -> Tensor:
        """Where `tokens` (any shape) stand among the share's columns; n for those that are not there."""
        if self._column_of is None:
            table = torch.full((self._vocab_size + 1,), len(self.tokens), device=self.tokens.device)
            table[self.tokens[: self.size]] = torch.arange(self.size, device=table.device)
            self._column_of = table
        absent = (tokens < 0) | (tokens > self._vocab_size)
        return self._column_of[tokens.masked_fill(absent, self._vocab_size)]


def _indices(indices: IndexSet, device: torch.device) -> Tensor:
    pieces = [torch.arange(start, stop, device=device) for start, stop in indices.intervals]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device=device)
