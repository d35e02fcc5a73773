"""Attention of one layer as one op, with everything that its meaning depends on as arguments.

    q     [B, H, S, D]      mask   additive, broadcastable to [B, H, S, T]
    k     [B, G, T, D]      sinks  [H], or broadcastable to [B, H, S, 1]
    v     [B, G, T, Dv]     result [B, H, S, Dv]

Scaled dot-product attention (arXiv:1706.03762, 3.2.1) with grouped heads (arXiv:2305.13245), logit soft-capping
(arXiv:2408.00118, 2) and attention sinks (arXiv:2309.17453, 3.2: one more logit per head that takes weight but has no
value).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["allowed", "attention", "per_query_head", "products"]


def allowed(
    queries: Tensor, keys: Tensor, *, causal: bool = False, window: int | None = None, chunk: int | None = None
) -> Tensor:
    """Which key positions each query position may see: bool, broadcast over the two index tensors.

    causal: key <= query. window n: key > query - n, and without causal also key < query + n. chunk n: query and key
    lie in the same chunk of n positions.
    """
    seen = (queries >= 0) & (keys >= 0)
    if causal:
        seen = seen & (keys <= queries)
    if window is not None:
        seen = seen & (keys > queries - window)
        if not causal:
            seen = seen & (keys < queries + window)
    if chunk is not None:
        seen = seen & (keys // chunk == queries // chunk)
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    kv_map: list[int] | None = None,
    written_out: bool = False,
) -> Tensor:
    """See the module's docstring; `kv_map[h]` is the kv head of query head h, None where each serves H / G in order.

    `written_out`: as products and a softmax, where no kernel for the whole is known to be faster.
    """
    batch, heads, q_length, _ = q.shape
    kv_length = k.shape[2]
    if heads == 0:
        return q.new_empty(batch, 0, q_length, v.shape[-1])
    if kv_map is not None:
        k, v = k[:, kv_map], v[:, kv_map]
    longest = max(q_length, kv_length)
    # a limit that no position reaches would only keep the fast kernels away
    window = None if window is not None and window >= longest else window
    chunk = None if chunk is not None and chunk >= longest else chunk
    explicit = written_out or softcap is not None or sinks is not None
    if window is not None or chunk is not None or (causal and (explicit or mask is not None)):
        positions = torch.arange(longest, device=q.device)
        seen = allowed(positions[:q_length, None], positions[:kv_length], causal=causal, window=window, chunk=chunk)
        minus_infinity = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)
        mask = minus_infinity if mask is None else mask.to(q.dtype) + minus_infinity
        causal = False
    elif mask is not None:
        mask = mask.to(q.dtype)
    grouped = k.shape[1] != heads
    if grouped and q_length == 1 and (not causal or kv_length == 1) and heads % k.shape[1] == 0:
        # one query per head: those of a kv head are rows of one matrix, and nothing copies keys or values for them
        per_group = (batch, k.shape[1], heads // k.shape[1], q.shape[-1])
        if mask is not None and mask.dim() > 2 and mask.shape[-3] == heads:
            mask = mask.reshape(*mask.shape[:-3], *per_group[1:3], mask.shape[-1])
        if sinks is not None:
            sinks = sinks.reshape(1, -1, 1, 1) if sinks.dim() == 1 else sinks
            sinks = sinks.expand(batch, heads, 1, 1).reshape(*per_group[:3], 1)
        rows = q.reshape(per_group)
        if explicit:
            out = _written_out(rows, k, v, mask, sinks, scale, softcap)
        else:
            out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        return out.reshape(batch, heads, 1, v.shape[-1])
    if explicit:
        return _written_out(q, k, v, mask, sinks, scale, softcap)
    if grouped and mask is not None and q.device.type == "cuda":
        # with a mask, grouped heads would fall back to the slow kernel
        k, v, grouped = per_query_head(k, heads), per_query_head(v, heads), False
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    heads = q.shape[1]
    scores = products(q, per_query_head(k, heads)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1) if sinks.dim() == 1 else sinks
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights @ per_query_head(v, heads)


def products(q: Tensor, k: Tensor) -> Tensor:
    """Scores [B, H, S, T], in float32 at least: float16 cannot hold what is not scaled yet, and what all keys have in
    common would round away in 2 bytes how they differ.
    """
    if q.dtype.itemsize >= 4:
        return q @ k.transpose(-2, -1)
    if q.device.type == "cpu":  # which has no product of another dtype
        return q.float() @ k.float().transpose(-2, -1)
    one_by_one = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(-2, -1), out_dtype=torch.float32)
    return one_by_one.view(*q.shape[:3], k.shape[2])


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values once for each of the query heads that they serve."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
