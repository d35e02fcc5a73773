"""Gated linear attention: a state that decays, and to which each token adds an outer product.

    S[t] = exp(decay[t]) S[t - 1] + k[t] v[t]^T        out[t] = q[t] S[t]

    q, k [B, S, H, K]   v [B, S, H, V]   decay [B, S, H], at most 0   state [B, H, K, V]
    -> out [B, S, H, V], state [B, H, K, V] after the last token

In chunks: what tokens of one chunk say to each other is a masked product; a state is carried from chunk to chunk only.
Source: state-space duality (arXiv:2405.21060, section 6), gated linear attention (arXiv:2312.06635, section 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.ops.state.chunks import in_chunks, in_order, pairwise, precision

__all__ = ["gated_linear_attention"]


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the module's docstring. `state`: of the tokens before; None: there are none."""
    dtype, size = precision(q), q.shape[1]
    queries, keys, values = (in_chunks(x, dtype) for x in (q, k, v))
    since_start = in_chunks(decay, dtype).cumsum(-1)
    within = (queries @ keys.transpose(-1, -2)) * pairwise(since_start)
    to_end = (since_start[..., -1:] - since_start).exp()
    added = (keys * to_end[..., None]).transpose(-1, -2) @ values
    left = since_start[..., -1].exp()[..., None, None]
    state = torch.zeros_like(added[:, :, 0]) if state is None else state.to(dtype)
    before = []
    for chunk in range(added.shape[2]):
        before.append(state)
        state = torch.addcmul(added[:, :, chunk], left[:, :, chunk], state)
    seen = (queries * since_start.exp()[..., None]) @ torch.stack(before, dim=2)
    return in_order(within @ values + seen, size), state
