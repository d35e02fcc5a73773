"""One new token over a cache whose tokens ranks share out, as launches of `shared_kernel.py`.

k, v [B, G, 1, D]   keys, values [B, G, slots, D]   is_own, before [B, 1]   of what the rank keeps of each row
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merged_rows", "own_or_last_rows", "packed_rows"]


def own_or_last_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    is_own: Tensor,
    before: Tensor,
    rotation: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value that the rank appends, and at which of its tokens, [B, 1]: its last once more where it keeps
    none.

    is_own: whether it keeps the token. before: how many of the row's tokens it has kept before it. rotation: of q and
    k, as in `decode_attention`, which is still to be done.
    """
    from runtime.ops.kernels.decode.shared_kernel import own_or_last  # Triton comes with torch for GPUs only

    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    key, value, at = torch.empty_like(k), torch.empty_like(v), torch.empty_like(before)
    query = q if rotation is None else torch.empty_like(q)
    cos, sin, half = (q, q, 0) if rotation is None else rotation
    size, value_size, pairs = k.shape[-1], v.shape[-1], k.shape[0] * k.shape[1]
    own_or_last[(pairs + (0 if rotation is None else q.shape[0] * q.shape[1]),)](
        k, v, keys, values, is_own.contiguous(), before.contiguous(), key, value, at, q, query, cos, sin, pairs,
        *keys.stride()[:2], *values.stride()[:2], *(0 if x.shape[0] == 1 else x.stride(0) for x in (cos, sin)),
        HEADS=k.shape[1], QUERY_HEADS=q.shape[1], D=size, DV=value_size, D_PADDED=_power_of_2(size),
        DV_PADDED=_power_of_2(value_size), HALF=half % size, num_warps=1,
    )  # fmt: skip
    return query, key, value, at


def packed_rows(out: Tensor, lse: Tensor, is_own: Tensor, before: Tensor) -> Tensor:
    """[B, H, 1, Dv] and [B, H] as [B, H, 1, Dv + 1] in float32; where the rank keeps nothing, it changes nothing."""
    from runtime.ops.kernels.decode.shared_kernel import packed  # Triton comes with torch for GPUs only

    batch, heads, _, width = out.shape
    rows = torch.empty(batch, heads, 1, width + 1, dtype=torch.float32, device=out.device)
    packed[(batch * heads,)](
        out.contiguous(), lse.contiguous(), is_own.contiguous(), before.contiguous(), rows,
        HEADS=heads, DV=width, DV_PADDED=_power_of_2(width), num_warps=1,
    )  # fmt: skip
    return rows


def merged_rows(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Such rows of all ranks, [P, .., Dv + 1], together: [.., Dv]."""
    from runtime.ops.kernels.decode.shared_kernel import merged  # Triton comes with torch for GPUs only

    width, num_rows = parts.shape[-1] - 1, parts[0].numel() // parts.shape[-1]
    out = torch.empty(*parts.shape[1:-1], width, dtype=dtype, device=parts.device)
    if num_rows:
        merged[(num_rows,)](
            parts.contiguous(), out, num_rows, PARTS=parts.shape[0], DV=width, DV_PADDED=_power_of_2(width),
            num_warps=1,
        )  # fmt: skip
    return out


def _power_of_2(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
