"""The gated delta rule: a state that decays, and in which each token replaces what its key finds.

    S'   = exp(decay[t]) S[t - 1]
    S[t] = S' + beta[t] k[t] (v[t] - k[t] S')^T        out[t] = q[t] S[t]

    q, k [B, S, H, K]   v [B, S, H, V]   decay (at most 0), beta [B, S, H]   state [B, H, K, V]
    -> out [B, S, H, V], state [B, H, K, V] after the last token

A decay [B, S, H, K] is one for each row of the state (Kimi delta attention).

In chunks: what the tokens of one chunk replace of each other's is a triangular system, solved for all chunks at once;
a state is carried from chunk to chunk only. Source: arXiv:2406.06484, section 3 (the delta rule in chunks, by the WY
form of a product of reflections), arXiv:2412.06464, section 3.3 (with decay), arXiv:2510.26692, section 3 (of rows).
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.ops.state.chunks import decayed_products, in_chunks, in_order, precision

__all__ = ["gated_delta_rule"]


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See the module's docstring. `state`: of the tokens before; None: there are none."""
    dtype, size, width = precision(q), q.shape[1], v.shape[-1]
    queries, keys, values = (in_chunks(x, dtype) for x in (q, k, v))
    of_rows = decay if decay.dim() == 4 else decay[..., None]
    since_start, rates = in_chunks(of_rows, dtype).cumsum(-2), in_chunks(beta, dtype)[..., None]
    from_start = since_start.exp()
    scaled = keys * rates
    # row i: what is replaced at token i, less what tokens j < i of the chunk put there; the diagonal counts as ones
    system, within = decayed_products(torch.stack([scaled, queries]), keys, since_start)
    wanted = torch.cat([values * rates, scaled * from_start], dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    own, of_state = solved[..., :width], solved[..., width:]
    to_end = (since_start[..., -1:, :] - since_start).exp()
    stored = (keys * to_end).transpose(-1, -2)
    kept = since_start[..., -1, :].exp()[..., None]
    if state is None:
        state = q.new_zeros((q.shape[0], q.shape[2], q.shape[3], width), dtype=dtype)
    state = state.to(dtype)
    before, new = [], []
    for chunk in range(own.shape[2]):
        before.append(state)
        new.append(own[:, :, chunk] - of_state[:, :, chunk] @ state)
        state = torch.addcmul(stored[:, :, chunk] @ new[-1], kept[:, :, chunk], state)
    out = (queries * from_start) @ torch.stack(before, dim=2) + within @ torch.stack(new, dim=2)
    return in_order(out, size), state
