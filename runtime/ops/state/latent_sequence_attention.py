"""`latent_attention` over a cache whose tokens ranks share out: the narrow value is what each keeps, and what travels.

    latent, carried       [B, S_i, R], [B, S_i, E]      of the rank's own tokens
    q, carried_q          [B, H, S_i, P], [.., E]       of own tokens, of the heads that the rank has
    key_weight, value_weight                            as in `latent_attention`
    result                [B, H, S_i, V]

    how       what travels                                        bytes that leave a rank, with S_i = S / n
    ring      the narrow value, a rank's at a time                (n - 1) S_i (R + E)
    gather    the same, all at once                               the same
    merge     of runs that every rank has: [B, H, S, V + 1]       what queries see of the rank's part, absorbed

It has no heads, so that heads are not exchanged for tokens. Of what has come, keys and values are made for the heads of
the rank, or queries are absorbed, whichever takes fewer products. Options: as in `cached_sequence_attention`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from partitioner.errors import InputError
from runtime.ops.collectives import unbound

__all__ = ["latent_sequence_attention", "without_latent_cache"]


def latent_sequence_attention(
    q: Tensor,
    carried_q: Tensor | None,
    latent: Tensor,
    carried: Tensor | None,
    key_weight: Tensor,
    value_weight: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    axis: str | tuple[str, ...],
    *,
    how: str,
    parts: int,
    state: str,
    scale: float,
    order: str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """See the module's docstring. A cache takes its place when a rank is loaded."""
    unbound("latent_sequence_attention", axis)


def without_latent_cache(channel: Any, *operands: Any, state: str, **options: Any) -> Tensor:
    """What it is over a channel alone."""
    raise InputError(
        f"latent_sequence_attention of {state!r} is not bound to a cache: run the rank through Engine.generate or "
        "parts.generate(...)"
    )
