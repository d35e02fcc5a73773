"""Attention to a part of the keys, and what several parts are together.

    q     [B, H, S, D]      mask     additive, broadcastable to [B, H, S, T]
    k     [B, G, T, D]      out      [B, H, S, Dv]   over these keys only
    v     [B, G, T, Dv]     lse      [B, H, S]       the logarithm of the sum of the exponentials of its scores

Two parts are `exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2` together, `lse` being the logarithm of
`exp(lse_1) + exp(lse_2)`: no part needs to know another's scores (FlashAttention-2, arXiv:2307.08691, section 3.1). A
query that sees none of the keys has an `out` of 0 and an `lse` of minus infinity, which changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from runtime.ops.attention import per_query_head, products
from runtime.ops.kernels.merge.merge_part import can_merge, merge_part
from runtime.ops.kernels.partial_kernels import by_cuda_kernel

__all__ = ["Merged", "accumulating", "merge_into", "merge_parts", "partial_attention", "with_sinks"]

_TILE = 1024
"""Queries and keys at a time where scores are written out."""


def accumulating(dtype: torch.dtype) -> torch.dtype:
    """What parts are merged in: float32 at least."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See the module's docstring. causal: query i sees keys 0 to i. H / G query heads share a kv head, in order."""
    if 0 in (*q.shape[:3], k.shape[2]):
        lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulating(q.dtype), device=q.device)
        return q.new_zeros(*q.shape[:3], v.shape[-1]), lse
    found = None
    if softcap is None and q.device.type == "cpu":
        found = _by_cpu_kernel(q, k, v, scale=scale, causal=causal, mask=mask)
    elif softcap is None and q.device.type == "cuda":
        found = by_cuda_kernel(q, k, v, scale=scale, causal=causal, mask=mask)
    if found is None:
        return _written_out(q, k, v, scale=scale, causal=causal, mask=mask, softcap=softcap)
    return found if mask is None else _with_hidden_rows(*found, mask)


def _by_cpu_kernel(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The flash kernel of torch, which takes heads of one width, and either a mask or a causal one."""
    if causal and mask is not None:
        return None
    width = max(q.shape[-1], v.shape[-1])
    if mask is not None:
        mask = mask.to(q.dtype).expand(*([1] * (4 - mask.dim())), *mask.shape[:-2], q.shape[2], k.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _wide(q, width), _wide(k, width), _wide(v, width), 0.0, causal, attn_mask=mask, scale=scale
    )
    return out[..., : v.shape[-1]], lse


def _wide(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))


def _with_hidden_rows(out: Tensor, lse: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels give a query that sees nothing some score, or no number."""
    hidden = (mask == -torch.inf).all(-1)
    return out.masked_fill(hidden[..., None], 0), lse.masked_fill(hidden, -torch.inf)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """As products, tile by tile, so that no more than a tile of the scores is ever held."""
    merged = Merged(q, v.shape[-1])
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], q.shape[2], k.shape[2])
    for start in range(0, q.shape[2], _TILE):
        rows = slice(start, min(start + _TILE, q.shape[2]))
        end = min(k.shape[2], rows.stop) if causal else k.shape[2]
        for at in range(0, end, _TILE):
            columns = slice(at, min(at + _TILE, end))
            scores = products(q[:, :, rows], per_query_head(k[:, :, columns], q.shape[1])) * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            if mask is not None:
                scores = scores + mask[..., rows, columns]
            if causal:
                scores = scores.masked_fill(_later(rows, columns, q.device), -torch.inf)
            lse = torch.logsumexp(scores, -1)
            weights = torch.exp(scores - _finite(lse)[..., None]).to(v.dtype)
            merged.add(weights @ per_query_head(v[:, :, columns], q.shape[1]), lse, rows)
    return merged.out, merged.lse


def _later(rows: slice, columns: slice, device: torch.device) -> Tensor:
    """[S, T]: keys that stand behind the query."""
    queries = torch.arange(rows.start, rows.stop, device=device)
    return torch.arange(columns.start, columns.stop, device=device) > queries[:, None]


def _finite(lse: Tensor) -> Tensor:
    """What may be subtracted: minus infinity from itself is no number."""
    return lse.masked_fill(lse == -torch.inf, 0)


class Merged:
    """What the parts added so far are together, for queries q [B, H, S, D]: in float32 at least.

    One part of all queries, and one more of all or some, wait as they are: where they stay alone they are merged and
    rounded once, without a pass over memory to float32 and back. They belong to this object then.
    """

    def __init__(self, q: Tensor, width: int) -> None:
        """`width`: that of a value."""
        self._shape, self._dtype, self._device = (*q.shape[:3], width), accumulating(q.dtype), q.device
        self._waiting: list[tuple[Tensor, Tensor, slice]] = []
        self._sums: tuple[Tensor, Tensor] | None = None
        self._filled: list[tuple[int, int]] = []

    @property
    def out(self) -> Tensor:
        return self._total()[0]

    @property
    def lse(self) -> Tensor:
        return self._total()[1]

    def add(self, out: Tensor, lse: Tensor, rows: slice) -> None:
        """A part that the queries `rows` have seen."""
        covers = rows.start == 0 and rows.stop == self._shape[2]
        if self._sums is None and (len(self._waiting) == 1 or (covers and not self._waiting)):
            self._waiting.append((out, lse, rows))
        else:
            self._total()
            self._add(out, lse, rows)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """All of it, [B, H, S, Dv]; nothing is added any more."""
        if self._sums is not None or not self._waiting or self._waiting[0][0].dtype != dtype:
            return self.out.to(dtype)
        (total, sums, _), *others = self._waiting
        for out, lse, rows in others:
            merge_into(total[:, :, rows], sums[:, :, rows], out, lse)
        self._waiting.clear()
        self._sums = total, sums
        return total

    def _total(self) -> tuple[Tensor, Tensor]:
        if self._sums is None:
            self._sums = (
                torch.zeros(self._shape, dtype=self._dtype, device=self._device),
                torch.full(self._shape[:3], -torch.inf, dtype=self._dtype, device=self._device),
            )
            for part in self._waiting:
                self._add(*part)
            self._waiting.clear()
        return self._sums

    def _add(self, out: Tensor, lse: Tensor, rows: slice) -> None:
        assert self._sums is not None
        mine, total = (each[:, :, rows] for each in self._sums)
        is_first = all(rows.stop <= start or stop <= rows.start for start, stop in self._filled)
        self._filled.append((rows.start, rows.stop))
        if is_first:
            mine.copy_(out)
            total.copy_(lse)
        else:
            merge_into(mine, total, out, lse)


def merge_into(total: Tensor, sums: Tensor, out: Tensor, lse: Tensor) -> None:
    """The `total` [B, H, S, Dv] and `sums` [B, H, S] become what they and a part are together, rounded at the end."""
    if can_merge(total, out):
        merge_part(total, sums, out, lse)
        return
    both = torch.logaddexp(sums, lse)
    base = _finite(both)
    total.copy_(total * torch.exp(sums - base)[..., None] + out * torch.exp(lse - base)[..., None])
    sums.copy_(both)


def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Parts [P, B, H, S, Dv] and [P, B, H, S] all at once."""
    lse = torch.logsumexp(lses, 0)
    return (outs * torch.exp(lses - _finite(lse))[..., None]).sum(0), lse


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """`out` with one more score per head, which takes weight but has no value; see `attention`."""
    if sinks is None:
        return out
    sinks = sinks.reshape(1, -1, 1, 1) if sinks.dim() == 1 else sinks
    scores = sinks.to(lse.dtype).expand(*lse.shape, 1)[..., 0]
    return out * torch.exp(lse - torch.logaddexp(lse, scores))[..., None]
