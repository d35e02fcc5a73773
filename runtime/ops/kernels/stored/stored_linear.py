"""Products with weights that are held as they were stored: codes and scales, dequantised where they are used.

    weight[.., n, k] = (number(codes[.., n, k]) - zeros[r, g]) * scales[r, g]     r = rows[.., n], g = columns[k]

    codes [.., N, K] float8, or uint8 [.., N, K/2] with two codes a byte     scales, zeros [R, G]
    rows int32 [.., N]   columns int32 [K]

    stored_linear(x [.., K], ..)                  -> [.., N]           as linear(x, weight, bias)
    stored_grouped_linear(x [T, K], .., counts)   -> [T, N]            as grouped_linear(x, weight [E, N, K], counts)
    stored_weight(..)                             -> the weight [.., N, K], for any other op; turned: [.., K, N]

Which scale is whose is told by row and by column, so that a rank may hold any of them: beside the border of a block, or
in activation order. Each weight is rounded to the dtype of the product, as it would be if it were held expanded; on a
CPU the results are so the same to the bit. On a GPU kernels in Triton dequantise where the numbers are used, and sum in
another order (`runtime.ops.kernels.stored.stored_products`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from runtime.ops.kernels.stored.codes import exponents, nibbles, numbers
from runtime.ops.kernels.stored.stored_products import product
from runtime.ops.kernels.triton_needs import missing_for_triton

__all__ = ["stored_grouped_linear", "stored_linear", "stored_weight"]

NO_ZEROS = 8
"""What is subtracted of codes of four bits whose zeros are not stored: they are from -8 to 7."""
_STRIP = 1 << 24
"""Numbers that are held expanded at a time, where a weight has no kernel."""
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def stored_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    code: str,
    computed_in: torch.dtype,
    dtype: torch.dtype,
    turned: bool = False,
) -> Tensor:
    """See the module's docstring. computed_in: the dtype of the product with the scale."""
    count = columns.shape[0]
    unpacked = codes if code == "float8" else nibbles(codes, 0, count)
    wide = torch.promote_types(computed_in, dtype) if code == "float4" else computed_in
    found = numbers(unpacked, code, wide)
    place = rows.long()[..., None], columns.long()
    if code == "int4":
        found = found - (NO_ZEROS if zeros is None else zeros[place].to(wide))
    scale = scales[place]
    scale = exponents(scale) if scale.dtype == torch.uint8 else scale
    weight = (found * scale.to(wide)).to(dtype)
    return weight.transpose(-1, -2) if turned else weight


def stored_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    bias: Tensor | None = None,
    *,
    code: str,
    computed_in: torch.dtype,
) -> Tensor:
    """See the module's docstring."""
    if _has_kernel(x, codes, scales):
        return product(x, codes, scales, zeros, rows, columns, bias, None, code)  # type: ignore[no-any-return]
    size = max(1, _STRIP // max(1, columns.shape[0]))
    parts = [
        functional.linear(
            x,
            stored_weight(part, scales, zeros, own, columns, code=code, computed_in=computed_in, dtype=x.dtype),
            None if bias is None else bias[start : start + size],
        )
        for start in range(0, rows.shape[0], size)
        for part, own in [(codes[start : start + size], rows[start : start + size])]
    ]
    if not parts:
        return x.new_zeros(*x.shape[:-1], 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def stored_grouped_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    counts: Tensor,
    bias: Tensor | None = None,
    *,
    code: str,
    computed_in: torch.dtype,
) -> Tensor:
    """See the module's docstring. Without a kernel, only experts that have a token are dequantised, one at a time."""
    if _has_kernel(x, codes, scales):
        return product(x, codes, scales, zeros, rows, columns, bias, counts, code)  # type: ignore[no-any-return]
    out = x.new_zeros(x.shape[0], rows.shape[-1])
    start = 0
    for i, count in enumerate(counts.tolist()):
        if count:
            out[start : start + count] = stored_linear(
                x[start : start + count], codes[i], scales, zeros, rows[i], columns,
                None if bias is None else bias[i], code=code, computed_in=computed_in,
            )  # fmt: skip
            start += count
    return out


def _has_kernel(x: Tensor, codes: Tensor, scales: Tensor) -> bool:
    return x.is_cuda and x.dtype in _KERNEL_DTYPES and not missing_for_triton() and codes.numel() > 0
