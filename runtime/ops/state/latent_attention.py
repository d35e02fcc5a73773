"""Attention whose keys and values are products of a narrow value, which is cached in their place.

    latent        [B, S, R]         of the tokens of this call        key_weight     [H, P, R]
    carried       [B, S, E]         cached as it is, of all heads     value_weight   [H, V, R]
    q             [B, H, S, P]      meets the keys that are products
    carried_q     [B, H, S, E]      meets what is carried
    state.latent  [B, 1, slots, R + E]

    keys[h, t]    = (key_weight[h] latent[t], carried[t])       values[h, t] = value_weight[h] latent[t]
    result        [B, H, S, V]

The same numbers come of it in two ways:

    absorbed    q key_weight meets the cache as it lies, one key for all heads; value_weight takes the mean of latents
    expanded    keys and values are made of all that is cached, for the tokens of this call

Absorbed, a step of one token reads the narrow value alone; expanded, the many tokens of a prompt meet short keys. What
takes fewer products is done. Multi-head latent attention: arXiv:2405.04434, section 2.1, and its appendix C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.ops.attention import attention

__all__ = ["EXPANDED_BYTES", "Seen", "absorbs", "attend", "latent_attention", "of_heads", "over_cache"]

EXPANDED_BYTES = 1 << 28
"""Of keys and values that are made at a time; heads take turns beyond that."""


def latent_attention(
    q: Tensor,
    carried_q: Tensor | None,
    latent: Tensor,
    carried: Tensor | None,
    key_weight: Tensor,
    value_weight: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    state: str,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """See the module's docstring; `positions` and the keywords are those of `cached_attention`. A cache takes its place
    when a rank is loaded.
    """
    raise InputError(
        f"latent_attention of {state!r} is not bound to a cache: run the rank through Engine.generate or "
        "parts.generate(...)"
    )


class Seen(NamedTuple):
    """What a run sees of a cache. rows: [B, T, R + E], its own among them. hidden: minus infinity where a query must
    not look, [B, 1, S, T]; None: it may look everywhere, or is_first: the rows are the run's own, and nothing came
    before. captured: whether the run is one that is replayed.
    """

    rows: Tensor
    hidden: Tensor | None
    captured: bool = False
    is_first: bool = False


def over_cache(
    keep: Callable[[Tensor], Seen],
    options: dict[str, Any],
    by_kernel: Callable[..., Tensor] | None = None,
    all_move: Callable[[], bool] = lambda: True,
) -> Callable[..., Tensor]:
    """The function that takes the place of a `latent_attention` with these keywords: it takes the op's tensors.

    keep: adds the rows of the run to the cache, [B, S, R + E]. by_kernel: does so for one token of each row, where
    `all_move`, and attends to what is cached: of absorbed queries [B, H, 1, R + E], the rows, latents [B, 1, R] alone,
    positions and sinks it makes means of latents [B, H, 1, R].
    """
    given = {name: options[name] for name in ("scale", "softcap")}
    limits = {name: options[name] for name in ("causal", "window", "chunk")}

    def attend_over_cache(
        q: Tensor,
        carried_q: Tensor | None,
        latent: Tensor,
        carried: Tensor | None,
        key_weight: Tensor,
        value_weight: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        rows = latent if carried is None else torch.cat([latent, carried], -1)
        if by_kernel is not None and q.shape[2] == 1 and all_move():
            if q.shape[1] == 0:
                return q.new_empty(q.shape[0], 0, 1, value_weight.shape[1])
            means = by_kernel(_lifted(q, carried_q, key_weight), rows, latent, positions, sinks)
            return torch.matmul(means, value_weight.transpose(1, 2))
        seen = keep(rows)
        if seen.is_first:
            return attend(q, carried_q, seen.rows, key_weight, value_weight, mask, sinks, **given, **limits)
        if seen.hidden is not None:
            mask = seen.hidden if mask is None else mask.to(q.dtype) + seen.hidden
        # as of keys and values: a captured step pays for the products and not for the kernel's walk
        written_out = seen.captured and q.device.type == "cuda"
        return attend(
            q, carried_q, seen.rows, key_weight, value_weight, mask, sinks, **given, written_out=written_out
        )  # fmt: skip

    return attend_over_cache


def absorbs(queries: int, keys: int, *, key: int, value: int, latent: int, carried: int) -> bool:
    """Whether `queries` tokens against `keys` cached ones take fewer products absorbed than expanded, per head."""
    made = latent * (key + value)
    absorbed = queries * made + queries * keys * (2 * latent + carried)
    return absorbed < keys * made + queries * keys * (key + carried + value)


def attend(
    q: Tensor,
    carried_q: Tensor | None,
    rows: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    causal: bool = False,
    window: int | None = None,
    chunk: int | None = None,
    written_out: bool = False,
) -> Tensor:
    """`rows` [B, T, R + E]: what is cached, of this call's tokens too; the rest as in `runtime.ops.attention`."""
    batch, heads, queries, key = q.shape
    value, latent = value_weight.shape[1:]
    if heads == 0:
        return q.new_empty(batch, 0, queries, value)
    keys, carried = rows.shape[1], rows.shape[2] - latent
    is_limited = causal or window is not None or chunk is not None
    if not is_limited and absorbs(queries, keys, key=key, value=value, latent=latent, carried=carried):
        return _absorbed(q, carried_q, rows, key_weight, value_weight, mask, sinks, scale, softcap, written_out)
    each = keys * batch * (key + carried + value) * rows.element_size()
    step = max(1, EXPANDED_BYTES // max(1, each))
    parts = []
    for first in range(0, heads, step):
        here = slice(first, first + step)
        made = torch.matmul(rows[:, None, :, :latent], key_weight[here].transpose(1, 2))
        whole = q[:, here]
        if carried_q is not None:
            shared = rows[:, None, :, latent:].expand(-1, made.shape[1], -1, -1)
            made, whole = torch.cat([made, shared], -1), torch.cat([whole, carried_q[:, here]], -1)
        values = torch.matmul(rows[:, None, :, :latent], value_weight[here].transpose(1, 2))
        found = attention(
            whole, made, values, of_heads(mask, here, heads), of_heads(sinks, here, heads),
            scale=scale, softcap=softcap, causal=causal, window=window, chunk=chunk, written_out=written_out,
        )  # fmt: skip
        parts.append(found)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _lifted(q: Tensor, carried_q: Tensor | None, key_weight: Tensor) -> Tensor:
    """Queries as they meet a row of the cache."""
    lifted = torch.matmul(q, key_weight)
    return lifted if carried_q is None else torch.cat([lifted, carried_q], -1)


def _absorbed(
    q: Tensor,
    carried_q: Tensor | None,
    rows: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    written_out: bool,
) -> Tensor:
    batch, heads, queries, _ = q.shape
    latent = value_weight.shape[2]
    lifted = _lifted(q, carried_q, key_weight)
    # all heads have one key: they are rows of one matrix
    flat, cached = lifted.reshape(batch, 1, heads * queries, -1), rows[:, None]
    if mask is not None:
        mask = mask.expand(-1, heads, -1, -1) if mask.dim() == 4 else mask.expand(heads, queries, -1)[None]
        mask = mask.reshape(mask.shape[0], 1, heads * queries, mask.shape[-1])
    if sinks is not None:
        sinks = sinks.reshape(1, -1, 1, 1) if sinks.dim() == 1 else sinks
        sinks = sinks.expand(batch, heads, queries, 1).reshape(batch, 1, heads * queries, 1)
    # a CPU's fused kernel wants values as wide as keys: what is carried comes along, and is dropped
    values = cached if flat.device.type == "cpu" else cached[..., :latent]
    found = attention(flat, cached, values, mask, sinks, scale=scale, softcap=softcap, written_out=written_out)
    return torch.matmul(found[..., :latent].view(batch, heads, queries, latent), value_weight.transpose(1, 2))


def of_heads(x: Tensor | None, here: slice, heads: int) -> Tensor | None:
    """The part of a mask [B, H, S, T] or of sinks [H] or [B, H, S, 1] for some heads."""
    if x is None or heads == 1:
        return x
    if x.dim() == 1:
        return x[here]
    return x if x.dim() < 3 or x.shape[-3] == 1 else x[..., here, :, :]
