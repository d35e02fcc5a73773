"""A product with what stands before and behind it, as one op: by a kernel for few rows, otherwise by torch, op by op.

    product(x, w, bias)                                    x w^T + bias
    product(x, u, gate=g, act="silu")                      act(x g^T) * (x u^T)
    product(x, [g; u], act="silu", gate_first=True)        the same of one matrix that holds both
    product(x, w, norm=(size, n, eps))                     rms_norm(x, size, n, eps) w^T
    product(x, w, added=y, norm=.., scales=..)             total = x + y, and the product of `added_norm`'s second

The kernel rounds once, what torch does op by op rounds each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from runtime.execution.fusion.operations import added_norm, gated
from runtime.ops.kernels.decode.few_rows import few_rows, takes

__all__ = ["product"]

Norm = tuple[list[int], Tensor | None, float]


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    act: str = "",
    gate_first: bool = True,
    added: Tensor | None = None,
    norm: Norm | None = None,
    scales: bool = False,
) -> Any:
    """x, added: [.., K]; weight, gate: [N, K], or weight [2 N, K] where it holds both. [.., N], or with the total."""
    if not _fits(x, weight, bias, gate, added, norm):
        return _one_by_one(x, weight, bias, gate, act, added, norm, gate_first=gate_first, scales=scales)
    if act and gate is None:
        first, second = weight.chunk(2)
        gate, weight = (first, second) if gate_first else (second, first)
    made = few_rows(x, weight, bias, gate=gate, act=act, added=added, norm=None if norm is None else (norm[1], norm[2]))
    shape = (*x.shape[:-1], weight.shape[0])
    return made.view(shape) if added is None else (made[0].view(x.shape), made[1].view(shape))


def _fits(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, added: Tensor | None, norm: Norm | None
) -> bool:
    scale = None if norm is None else norm[1]
    if not takes(x, weight, *(each for each in (bias, gate, added, scale) if each is not None)):
        return False
    if added is not None and added.shape != x.shape:
        return False
    return norm is None or (norm[0] == [x.shape[-1]] and (scale is None or scale.shape == x.shape[-1:]))


def _one_by_one(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, act: str, added: Tensor | None,
    norm: Norm | None, *, gate_first: bool, scales: bool,
) -> Any:  # fmt: skip
    total = None
    if norm is not None:
        size, scale, eps = norm
        if added is not None:
            total, x = added_norm(x, added, size, scale, eps, scales=scales)
        else:
            x = torch.rms_norm(x, size, scale, eps)
    y = linear(x, weight, bias)
    if gate is not None:
        y = gated(linear(x, gate), y, act)
    elif act:
        first, second = y.chunk(2, -1)
        y = gated(first, second, act) if gate_first else gated(second, first, act)
    return y if added is None else (total, y)
