"""The selective scan: each channel keeps some numbers, which decay each at its own rate.

    h[t, d, n] = exp(dt[t, d] a[d, n]) h[t - 1, d, n] + dt[t, d] x[t, d] b[t, n]
    y[t, d]    = sum over n of h[t, d, n] c[t, n]

    x, dt [B, D, S]   a [D, N], below 0   b, c [B, N, S]   state [B, D, N]
    -> y [B, D, S], state [B, D, N] after the last token

Rates differ within a channel, so that no product of matrices stands for many tokens: the state goes from token to
token, one fused multiply and add each; all else is done for many tokens at once. Source: arXiv:2312.00752, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.ops.state.chunks import LENGTH, precision

__all__ = ["selective_scan"]


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the module's docstring. `state`: of the tokens before; None: there are none."""
    dtype = precision(x)
    a = a.to(dtype)
    steps = dt.to(dtype).movedim(-1, 0)[..., None]
    inputs = x.to(dtype).movedim(-1, 0)[..., None]
    b, c = (each.to(dtype).movedim(-1, 0) for each in (b, c))
    state = a.new_zeros((x.shape[0], *a.shape)) if state is None else state.to(dtype)
    found = []
    for start in range(0, x.shape[-1], LENGTH):
        piece = slice(start, start + LENGTH)
        left = (steps[piece] * a).exp().unbind()
        states = steps[piece] * inputs[piece] * b[piece, :, None]
        for kept, held in zip(left, states.unbind(), strict=True):
            state = held.addcmul_(kept, state)
        found.append((states @ c[piece, :, :, None])[..., 0])
        state = state.clone()  # the last of a buffer of many
    return torch.cat(found).movedim(0, -1), state
