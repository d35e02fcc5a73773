"""The attention mask as an additive tensor, for the models that do more with it than attend.

    reference [B, ...]   padding [B, T], non-zero where a key is a token   result [B, 1, S, T]

The values are those of transformers' eager mask: 0 where a key is seen, the smallest finite number elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.ops.state import position_mask

__all__ = ["attention_mask"]


def attention_mask(
    reference: Tensor,
    q_length: int,
    kv_length: int,
    padding: Tensor | None = None,
    *,
    dtype: torch.dtype,
    causal: bool = False,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """See the module's docstring; `reference` gives the batch size and the device, the rest is as in `attention`."""
    positions = torch.arange(max(q_length, kv_length), device=reference.device)
    padding = None if padding is None else padding[:, :kv_length]
    mask = position_mask(
        positions[None, :q_length],
        positions[:kv_length],
        padding,
        dtype=dtype,
        causal=causal,
        window=window,
        chunk=chunk,
    )
    return mask.expand(reference.shape[0], 1, q_length, kv_length)
