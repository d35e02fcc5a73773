"""Attention to a part of the keys, and what several parts are together.

    q     [B, H, S, D]      mask     additive, broadcastable to [B, H, S, T]
    k     [B, G, T, D]      out      [B, H, S, Dv]   over these keys only
    v     [B, G, T, Dv]     lse      [B, H, S]       the log of the sum of the exponentials of its scores

Two parts with (out, lse) each are `exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2` together, `lse` being the log of
`exp(lse_1) + exp(lse_2)`: no part needs to know the scores of another (FlashAttention-2, arXiv:2307.08691, section
3.1). A query that sees none of the keys has an `out` of 0 and an `lse` of minus infinity, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from runtime.ops.kernels.partial_kernels import cuda_kernel

__all__ = ["Merged", "accumulating", "merge_parts", "partial_attention", "with_sinks"]

_TILE = 1024
"""Keys at a time where scores are written out."""


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
    """See the module's docstring. causal: query i sees keys 0 to i. H / G query heads share a kv head in order."""
    if 0 in (q.shape[0], q.shape[1], q.shape[2], k.shape[2]):
        return nothing_seen(q, v)
    if softcap is not None:
        return _written_out(q, k, v, scale=scale, causal=causal, mask=mask, softcap=softcap)
    if q.device.type == "cuda":
        found = cuda_kernel(q, k, v, scale=scale, causal=causal, mask=mask)
        if found is not None:
            return found if mask is None else _hidden_rows(*found, mask)
    elif q.device.type == "cpu":
        return _on_cpu(q, k, v, scale=scale, causal=causal, mask=mask)
    return _written_out(q, k, v, scale=scale, causal=causal, mask=mask, softcap=None)


def nothing_seen(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a part is that no query sees anything of."""
    lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulating(q.dtype), device=q.device)
    return q.new_zeros(*q.shape[:3], v.shape[-1]), lse


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """By torch's flash kernel, which takes heads of one width."""
    width = max(q.shape[-1], v.shape[-1])
    if mask is not None:
        mask = mask.to(q.dtype).expand(*(mask.shape[:-2] if mask.dim() > 2 else ()), q.shape[2], k.shape[2])
        if causal:
            mask, causal = mask.masked_fill(~_lower(q, k), -torch.inf), False
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _wide(q, width), _wide(k, width), _wide(v, width), 0.0, causal, attn_mask=mask, scale=scale
    )
    out = out[..., : v.shape[-1]]
    return (out, lse) if mask is None else _hidden_rows(out, lse, mask)


def _hidden_rows(out: Tensor, lse: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel says 0 of a query that sees nothing, which would be a score like others."""
    sees = (mask > -torch.inf).any(-1)
    sees = sees if sees.dim() < 4 else sees.expand(lse.shape)
    return out, lse.masked_fill(~sees, -torch.inf)


def _wide(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))


def _lower(q: Tensor, k: Tensor) -> Tensor:
    """[S, T]: the keys that stand no later than the query."""
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Tile by tile, so that never more than a tile of scores is held."""
    rows = []
    for start in range(0, q.shape[2], _TILE):
        queries = q[:, :, start : start + _TILE]
        merged = Merged(queries, v.shape[-1])
        stop = k.shape[2] if not causal else min(k.shape[2], start + queries.shape[2])
        for at in range(0, stop, _TILE):
            end = min(at + _TILE, stop)
            hidden = None if mask is None else _block(mask, start, start + queries.shape[2], at, end)
            if causal and end > start + 1:
                seen = _lower(q[:, :, :1].expand(-1, -1, end, -1), k[:, :, :end])
                lower = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
            merged.add(*_tile(queries, k[:, :, at:end], v[:, :, at:end], scale, hidden, softcap))
        rows.append(merged.result())
    return torch.cat([out for out, _ in rows], dim=2).to(q.dtype), torch.cat([lse for _, lse in rows], dim=2)
