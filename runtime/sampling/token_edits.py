"""Tokens that the next choice must take or must not take, on a rank's share of the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.sampling.grammar import among
from runtime.sampling.vocabulary_shards import Share

__all__ = ["TokenEdits"]


@dataclass(frozen=True)
class TokenEdits:
    """added: what single logits are raised by, before anything else, as (row, token, amount).

    forced: the only tokens that any row may take; () for all. Then banned: of every row; and per row, as pairs.

    Ids outside the vocabulary are ones that no row could take anyway.
    """

    forced: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    """(row, token)."""
    added: tuple[tuple[int, int, float], ...] = field(default=(), repr=False)
    """Each row and token at most once."""
    allowed: tuple[tuple[int, Tensor], ...] = field(default=(), repr=False, compare=False)
    """(row, bits of the only tokens that it may take), each row at most once; the bits as `grammar.py` has them."""

    def applied(self, own: Tensor, share: Share) -> Tensor:
        """`own` [B, n], this rank's logits, with -inf where a token is out of the question; `own` is not changed."""
        device = own.device
        if self.added:  # float32 at least, as penalties are computed elsewhere
            own = own.to(torch.promote_types(own.dtype, torch.float32))
        # one more column for tokens that are not this rank's
        wide = torch.cat([own, own.new_zeros(len(own), 1)], dim=1)
        if self.added:
            where = torch.tensor([entry[:2] for entry in self.added], device=device)
            raised = torch.tensor([entry[2] for entry in self.added], dtype=wide.dtype, device=device)
            # a token of another rank falls into the last column, which may be raised several times
            wide.index_put_((where[:, 0], share.locate(where[:, 1])), raised, accumulate=True)
        if self.forced:
            wide = torch.full_like(wide, -math.inf)
            wide[:, share.locate(torch.tensor(self.forced, device=device))] = 0
        if self.banned:
            wide[:, share.locate(torch.tensor(self.banned, device=device))] = -math.inf
        if self.pairs:
            rows, tokens = torch.tensor(self.pairs, device=device).unbind(dim=1)
            wide[rows, share.locate(tokens)] = -math.inf
        own = wide[:, :-1]
        if self.allowed:
            at = torch.tensor([row for row, _ in self.allowed], device=device)
            bits = torch.stack([bits for _, bits in self.allowed]).to(device)
            own[at] = own[at].masked_fill(~among(bits, share.tokens), -math.inf)
        return own
