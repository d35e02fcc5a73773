"""Attention whose keys and values come from a cache: those of this call are added to it first, by position.

    q          [B, H, S, D]     positions   [B, S], ascending in each row
    k, v       [B, G, S, D]     of the tokens of this call
    state      the name of the cache; "state.key" and "state.value" hold [B, G, slots, D]
    result     [B, H, S, Dv]

What a query may see is a matter of positions alone (see `attention.allowed`), so sequences of different lengths need
no padding mask: a slot that holds nothing, or a later token, is not seen. A token that stands twice in a row at one
position is written twice to one slot: so rows are filled up by repeating their last token.
Key-value caching: arXiv:1911.02150, section 2.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from partitioner.errors import InputError

__all__ = ["cached_attention", "last_token"]


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    kv_map: list[int] | None = None,
) -> Tensor:
    """See the module's docstring; the keywords are those of `attention`. A cache takes its place when a rank is
    loaded.
    """
    raise InputError(
        f"cached_attention of {state!r} is not bound to a cache: run the rank through Engine.generate or "
        "parts.generate(...)"
    )


def last_token(x: Tensor, last: Tensor) -> Tensor:
    """X [B, S, H], last [B] -> [B, 1, H]: of each sequence the row of its last token.

    Of several sequences that stand behind each other in one row, X [1, N, H], last [n] -> [n, 1, H].
    """
    if x.shape[0] == 1 and last.numel() > 1:
        return x[0].index_select(0, last)[:, None]
    if x.shape[1] == 1:
        return x
    index: Any = last.reshape(-1, 1, 1).expand(-1, 1, x.shape[-1])
    return x.gather(1, index)
