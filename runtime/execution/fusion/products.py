"""A product with what stands before and behind it, as one op: by a kernel for few rows, otherwise by torch, op by op.

    product(x, w, bias)                                    x w^T + bias
    product(x, u, gate=g, act="silu")                      act(x g^T) * (x u^T)
    product(x, [g; u], act="silu", gate_first=True)        the same of one matrix that holds both
    product(x, w, norm=(size, n, eps))                     rms_norm(x, size, n, eps) w^T
    product(x, w, added=y, norm=.., scales=..)             total = x + y, and the product of `added_norm`'s second
    product_of_sum(all_reduce)(p, x, w, norm=.., ..)       the same, y the all_reduce of another product, of `p`

The kernel rounds once, what torch does op by op rounds each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from runtime.execution.fusion.operations import added_norm, gated
from runtime.ops.kernels.decode.few_rows import PartialSums, few_rows, push_few_rows, takes

__all__ = ["product", "product_of_sum"]

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
    return _by_kernel(x, weight, bias, gate, act, added, norm, gate_first=gate_first)


def _by_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, act: str,
    added: Tensor | PartialSums | None, norm: Norm | None, *, gate_first: bool,
) -> Any:  # fmt: skip
    if act and gate is None:
        first, second = weight.chunk(2)
        gate, weight = (first, second) if gate_first else (second, first)
    made = few_rows(x, weight, bias, gate=gate, act=act, added=added, norm=None if norm is None else (norm[1], norm[2]))
    shape = (*x.shape[:-1], weight.shape[0])
    return made.view(shape) if added is None else (made[0].view(x.shape), made[1].view(shape))


def product_of_sum(all_reduce: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op of two products and of `all_reduce` between them, which has no kernel of its own where there is a way.

    all_reduce: of a tensor; its `partial_sums(shape, dtype)` says what ranks sum through, or None. All of them must
    choose alike: so what is asked of the operands here is the same on all ranks, whatever the sizes of their shards.
    """

    def product_of_sum(
        of: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None = None, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """of: the first product's x, weight and bias; the others as `product` has them with `added`."""
        gate, norm, shape = named.get("gate"), named["norm"], (*of[0].shape[:-1], of[1].shape[0])
        first = (each for each in (*of[1:], x) if each is not None)
        fits = x.shape == shape and takes(of[0], *first, may_be_empty=True)
        sums = None
        if fits and _fits(x, weight, bias, gate, None, norm, may_be_empty=True):
            sums = all_reduce.partial_sums(x.shape, x.dtype)
        if sums is None:
            return product(x, weight, bias, added=all_reduce(product(*of)), **named)  # type: ignore[no-any-return]
        halves = weight.chunk(2) if named.get("act") and gate is None else (weight,)
        push_few_rows(sums, *of, ahead=halves if gate is None else (gate, weight))
        return _by_kernel(  # type: ignore[no-any-return]
            x, weight, bias, gate, named.get("act", ""), sums, norm, gate_first=named.get("gate_first", True)
        )

    product_of_sum.num_products = 2  # type: ignore[attr-defined]
    return product_of_sum


def _fits(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, added: Tensor | None, norm: Norm | None,
    *, may_be_empty: bool = False,
) -> bool:  # fmt: skip
    scale = None if norm is None else norm[1]
    others = [weight, *(each for each in (bias, gate, added, scale) if each is not None)]
    if not takes(x, *others, may_be_empty=may_be_empty) or not x.numel():
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
