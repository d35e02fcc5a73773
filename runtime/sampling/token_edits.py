"""Tokens that the next choice must take or must not take, on a rank's share of the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.sampling.vocabulary_shards import Share

__all__ = ["TokenEdits"]


@dataclass(frozen=True)
class TokenEdits:
    """forced: the only tokens that any row may take; () for all. Then banned: of every row; and per row, as pairs.

    Ids outside the vocabulary are ones that no row could take anyway.
    """

    forced: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    """(row, token)."""

    def applied(self, own: Tensor, share: Share) -> Tensor:
        """`own` [B, n], this rank's logits, with -inf where a token is out of the question; `own` is not changed."""
        device = own.device
        # one more column for tokens that are not this rank's
        wide = torch.cat([own, own.new_zeros(len(own), 1)], dim=1)
        if self.forced:
            wide = torch.full_like(wide, -math.inf)
            wide[:, share.locate(torch.tensor(self.forced, device=device))] = 0
        if self.banned:
            wide[:, share.locate(torch.tensor(self.banned, device=device))] = -math.inf
        if self.pairs:
            rows, tokens = torch.tensor(self.pairs, device=device).unbind(dim=1)
            wide[rows, share.locate(tokens)] = -math.inf
        return wide[:, :-1]
