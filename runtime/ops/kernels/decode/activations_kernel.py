"""Activations inside kernels of Triton: of float32, by their names in `operations.py`."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activated"]


@triton.jit
def activated(x, ACT: tl.constexpr):
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # tanh(z) is 2 sigmoid(2 z) - 1
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        return tl.where(x < 0, 0.0, x)  # what is no number stays none
    else:
        tl.static_assert(ACT == "sigmoid")
        return tl.sigmoid(x)
