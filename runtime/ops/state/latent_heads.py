"""Heads whose keys and values are products of a narrow value, in groups, as queries meet what comes rank by rank.

    expanded    keys (key_weight[h] latent, carried) and values value_weight[h] latent are made of what has come
    absorbed    queries (q key_weight, carried_q) meet it as it is, one key for all heads; value_weight takes the mean

See `latent_attention`. Heads are grouped so that what is made at a time is of bounded size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.ops.state.latent_attention import EXPANDED_BYTES, absorbs

__all__ = ["HeadGroup", "OfLatent"]


@dataclass(frozen=True)
class HeadGroup:
    """q: queries of some heads, as keys are; width: that of a value. weights: of keys and values; None: absorbed."""

    heads: slice
    q: Tensor
    width: int
    key_weight: Tensor | None
    value_weight: Tensor

    def made_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows [B, 1, T, R + E]."""
        latent = self.value_weight.shape[2]
        if self.key_weight is None:
            return rows, rows[..., :latent]
        keys = torch.matmul(rows[..., :latent], self.key_weight.transpose(1, 2))
        if rows.shape[3] > latent:
            keys = torch.cat([keys, rows[..., latent:].expand(-1, keys.shape[1], -1, -1)], -1)
        return keys, torch.matmul(rows[..., :latent], self.value_weight.transpose(1, 2))

    def values_of(self, out: Tensor) -> Tensor:
        """What the heads yield, of the mean that they have seen."""
        if self.key_weight is not None:
            return out
        return torch.matmul(out, self.value_weight.to(out.dtype).transpose(1, 2))


class OfLatent:
    """Queries of a run and the weights of their keys and values; the tensors are those of `latent_attention`."""

    def __init__(self, key_weight: Tensor, value_weight: Tensor, q: Tensor, carried_q: Tensor | None) -> None:
        self._weights, self._q, self._carried_q = (key_weight, value_weight), q, carried_q
        self.num_heads, self.dtype = q.shape[1], q.dtype

    def groups(self, keys: int, *, total: int) -> list[HeadGroup]:
        """Whichever takes fewer products for `total` keys; keys: how many of them come at a time."""
        (key, latent), value = self._weights[0].shape[1:], self._weights[1].shape[1]
        carried = 0 if self._carried_q is None else self._carried_q.shape[3]
        if absorbs(self._q.shape[2], total, key=key, value=value, latent=latent, carried=carried):
            return self.absorbed()
        each = max(1, keys * self._q.shape[0] * (key + carried + value) * self._q.element_size())
        step = max(1, EXPANDED_BYTES // each)
        whole = self._q if self._carried_q is None else torch.cat([self._q, self._carried_q], -1)
        parts = (slice(first, min(first + step, self.num_heads)) for first in range(0, max(1, self.num_heads), step))
        return [
            HeadGroup(here, whole[:, here], value, self._weights[0][here], self._weights[1][here]) for here in parts
        ]

    def absorbed(self) -> list[HeadGroup]:
        key_weight, value_weight = self._weights
        lifted = torch.matmul(self._q, key_weight)
        if self._carried_q is not None:
            lifted = torch.cat([lifted, self._carried_q], -1)
        return [HeadGroup(slice(0, self.num_heads), lifted, value_weight.shape[2], None, value_weight)]
