"""The ops of `fuse_elementwise.py`: by a kernel where it takes what they are given, otherwise by torch, op by op.

    rotated(x, cos, sin, half)          [B, H, S, D]; cos, sin broadcast to it     x * cos + roll(x, -half) * sin
    gated(a, b, act)                    [.., N] both                               act(a) * b
    added_norm(a, b, size, w, eps)      [.., N] both, w [N] or None                a + b, and its rms_norm with weight w
                                        scales: w times the norm, which is rounded before

Rotary embedding: arXiv:2104.09864, section 3.4.2; gated units: arXiv:2002.05202, section 2; RMSNorm: arXiv:1910.07467,
section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from runtime.ops.kernels.decode.few_rows import can_launch_early
from runtime.ops.kernels.triton_needs import is_replayed, launch, missing_for_triton

__all__ = ["added_norm", "gated", "rotated"]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_ROWS = 1024
"""Tokens from which on a GPU is busy while its host launches: to launch one kernel of Triton's takes as long as several
of torch's."""
_MOST_NORMED = 16384
"""Numbers of a row that one program holds."""
_ELEMENTS = 1024
"""Of a program, about."""
_PER_WARP, _PER_WARP_OF_FEW = 512, 256
"""Numbers of a row that is normalised: of few rows, each program has a processor for itself."""


def takes(rows: int, *tensors: Tensor) -> bool:
    """Whether kernels take these, which are of one dtype and lie on one GPU; `rows`: tokens of the first."""
    first = tensors[0]
    if not first.is_cuda or (rows < LEAST_ROWS and not is_replayed()):
        return False
    alike = all(isinstance(x, Tensor) and x.dtype == first.dtype and x.device == first.device for x in tensors)
    return alike and first.dtype in _DTYPES and first.numel() > 0 and not missing_for_triton()


def _early(rows: int, device: torch.device) -> dict[str, Any]:
    """How to launch kernels for so many rows: in captured steps of few before their predecessor's end."""
    early = rows < LEAST_ROWS and can_launch_early(device)
    return {"EARLY": early, **({"launch_pdl": True} if early else {})}


def rotated(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    if x.dim() != 4 or not takes(x.shape[0] * x.shape[2], x, cos, sin) or not (_spreads(cos, x) and _spreads(sin, x)):
        return x * cos + torch.roll(x, [-half], [-1]) * sin
    return _rotated(x, cos.expand(x.shape), sin.expand(x.shape), half)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    from runtime.execution.fusion.elementwise_kernel import rotate  # Triton comes with torch for GPUs only

    batch, heads, size, width = x.shape
    out = x.new_empty(batch, size, heads, width).transpose(1, 2)  # token by token, as linears leave their results
    padded = 1 << (width - 1).bit_length()
    together = max(1, min(1 << (heads - 1).bit_length(), _ELEMENTS // padded))
    strides = *x.stride(), *cos.stride(), *sin.stride(), *out.stride()[:3]
    launch(
        rotate, (batch * size, -(-heads // together), 1), (x, cos, sin, out, heads, size, *strides),
        WIDTH=width, HALF=half % width, PADDED=padded, HEADS=together, num_warps=4,
        **_early(batch * size, x.device),
    )  # fmt: skip
    return out


def gated(a: Tensor, b: Tensor, act: str) -> Tensor:
    if a.shape != b.shape or not takes(a.shape[:-1].numel(), a, b):
        return ACTIVATIONS[act](a) * b
    return _gated(a, b, act)


def _gated(a: Tensor, b: Tensor, act: str) -> Tensor:
    from runtime.execution.fusion.elementwise_kernel import gate  # Triton comes with torch for GPUs only

    left, right, out = _rows(a), _rows(b), torch.empty(a.shape, dtype=a.dtype, device=a.device)
    rows, width = left.shape
    block = min(2 * _ELEMENTS, 1 << (width - 1).bit_length())
    given = left, right, out, width, left.stride(0), right.stride(0)
    early = _early(rows, a.device)
    launch(gate, (rows, -(-width // block), 1), given, ACT=act, BLOCK=block, num_warps=4, **early)
    return out


def added_norm(
    a: Tensor, b: Tensor, size: list[int], weight: Tensor | None, eps: float | None, *, scales: bool
) -> tuple[Tensor, Tensor]:
    fits = a.shape == b.shape and size == list(a.shape[-1:]) and 0 < size[0] <= _MOST_NORMED and eps is not None
    given = (a, b) if weight is None else (a, b, weight)
    fits = fits and takes(a.shape[:-1].numel(), *given) and (weight is None or weight.shape == a.shape[-1:])
    if fits:
        assert eps is not None
        return _added_norm(a, b, weight, eps)
    total = a + b
    if scales:
        assert weight is not None
        return total, weight * torch.rms_norm(total, size, None, eps)
    return total, torch.rms_norm(total, size, weight, eps)


def _added_norm(a: Tensor, b: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    from runtime.execution.fusion.elementwise_kernel import add_norm  # Triton comes with torch for GPUs only

    left, right = _rows(a), _rows(b)
    total, normed = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(2))
    rows, width = left.shape
    block = 1 << (width - 1).bit_length()
    scale: Any = left if weight is None else weight.contiguous()
    per_warp = _PER_WARP if rows >= LEAST_ROWS else _PER_WARP_OF_FEW
    launch(
        add_norm, (rows, 1, 1), (left, right, scale, total, normed, width, left.stride(0), right.stride(0), eps),
        WEIGHTED=weight is not None, BLOCK=block, num_warps=min(16, max(1, block // per_warp)),
        **_early(rows, a.device),
    )  # fmt: skip
    return total, normed


def _spreads(small: Tensor, x: Tensor) -> bool:
    shape = (1,) * (x.dim() - small.dim()) + tuple(small.shape)
    return len(shape) == x.dim() and all(s in (1, n) for s, n in zip(shape, x.shape, strict=True))


def _rows(x: Tensor) -> Tensor:
    """[rows, N], whose rows lie equally far apart: without a copy where x has such rows."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return x.contiguous().view(-1, x.shape[-1])
