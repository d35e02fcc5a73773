"""A product with what stands before and behind it, as one op: by a kernel for few rows, otherwise by torch, op by op.

    product(x, w, bias)                                    x w^T + bias
    product(x, u, gate=g, act="silu")                      act(x g^T) * (x u^T)
    product(x, [g; u], act="silu", gate_first=True)        the same of one matrix that holds both
    product(x, w, norm=(size, n, eps), scales=..)          rms_norm(x, size, n, eps) w^T, as `added_norm` scales
    product(x, w, added=y, norm=.., scales=..)             total = x + y, and the product of `added_norm`'s second
    summing_product(all_reduce, channel)                   the same of y that is still to be summed over the ranks
    chained_product(x, w, first=(h, v), norm=.., ..)       the same of y = h v^T

w, u, g: tensors, or weights that are held as stored (`StoredWeight`). A kernel rounds once, what torch does op by op
rounds each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from runtime.communication.channels import Channel
from runtime.execution.fusion.operations import added_norm, gated
from runtime.ops.kernels.decode import few_rows
from runtime.ops.kernels.stored import few_rows as few_stored_rows
from runtime.ops.kernels.stored.dot_rows import Ready
from runtime.ops.kernels.stored.few_rows import Stored
from runtime.ops.kernels.stored.stored_linear import stored_linear
from runtime.ops.kernels.tiles.several_rows import several_rows
from runtime.ops.kernels.tiles.several_rows import takes as takes_several

__all__ = ["chained_product", "product", "summing_product"]

Norm = tuple[list[int], Tensor | None, float]
StoredWeight = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, str, torch.dtype]
"""As `stored_linear` takes them: codes, scales, zeros, rows, columns, code, computed_in."""
Weight = Tensor | StoredWeight


def product(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    gate: Weight | None = None,
    act: str = "",
    gate_first: bool = True,
    added: Tensor | None = None,
    norm: Norm | None = None,
    scales: bool = False,
    ready: Ready | None = None,
) -> Any:
    """x, added: [.., K]; weight, gate: [N, K], or weight [2 N, K] where it holds both. [.., N], or with the total.

    ready: what has been made ready of x for the norm's product, if it was.
    """
    if norm is None or (norm[0] == [x.shape[-1]] and (norm[1] is None or norm[1].shape == x.shape[-1:])):
        first, second = (gate, weight) if gate is not None or not act else _halves(weight, gate_first=gate_first)
        made = _by_kernel(x, second, bias, first, act, added, None if norm is None else (norm[1], norm[2]), ready)
        if made is not None:
            y = made if added is None else made[1]
            shape = (*x.shape[:-1], y.shape[-1])
            return y.view(shape) if added is None else (made[0].view(x.shape), y.view(shape))
    return _one_by_one(x, weight, bias, gate, act, added, norm, gate_first=gate_first, scales=scales)


def summing_product(all_reduce: Callable[[Tensor], Tensor], channel: Channel) -> Callable[..., tuple[Tensor, Tensor]]:
    """`product` with `norm` and with `added`, of which `all_reduce` over the channel's ranks is still to be taken."""

    def of_sum(
        x: Tensor, weight: Weight, bias: Tensor | None = None, *, added: Tensor, norm: Norm, gate: Weight | None = None,
        act: str = "", gate_first: bool = True, scales: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        size, scale, eps = norm
        if size == list(x.shape[-1:]) and added.shape == x.shape:
            if x.shape[:-1].numel() > few_rows.MOST_ROWS:
                made = channel.sum_norm(added, x, scale, eps)
                if made is not None:
                    total, normed = made
                    return total, _gated_product(normed, weight, bias, gate, act, gate_first=gate_first)
            # the product of fewer rows takes the norm itself
            elif not _adds_for_nothing(x, weight) and (summed := channel.sum_added(added, x)) is not None:
                return summed, product(
                    summed, weight, bias, gate=gate, act=act, gate_first=gate_first, norm=norm, scales=scales
                )  # fmt: skip
        found: tuple[Tensor, Tensor] = product(
            x, weight, bias, gate=gate, act=act, gate_first=gate_first, added=all_reduce(added), norm=norm,
            scales=scales,
        )  # fmt: skip
        return found

    of_sum.is_product = True  # type: ignore[attr-defined]
    return of_sum


def chained_product(
    x: Tensor, weight: Weight, bias: Tensor | None = None, *, first: tuple[Tensor, Weight], norm: Norm,
    gate: Weight | None = None, act: str = "", gate_first: bool = True, scales: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`product` with `norm` and with `added`, which is another product: of one row, that one adds x to what it yields.

    Each of its programs adds a few numbers, where each program of the product behind it would add a whole row.
    """
    h, of_h = first
    is_row = x.shape[:-1].numel() == h.shape[:-1].numel() == 1 and norm[0] == list(x.shape[-1:])
    if is_row and not _adds_for_nothing(x, weight):
        made = _made_ready(h, of_h, x, norm, weight, gate, act, gate_first=gate_first)
        total, ready = made or (_by_kernel(h, of_h, x.reshape(-1), None, "", None, None), None)
        if total is not None and total.numel() == x.numel():
            total = total.view(x.shape)
            y = product(
                total, weight, bias, gate=gate, act=act, gate_first=gate_first, norm=norm, scales=scales, ready=ready
            )
            return total, y
    found: tuple[Tensor, Tensor] = product(
        x, weight, bias, gate=gate, act=act, gate_first=gate_first, added=product(h, of_h), norm=norm, scales=scales
    )  # fmt: skip
    return found


chained_product.is_product = True  # type: ignore[attr-defined]


def _adds_for_nothing(x: Tensor, weight: Weight) -> bool:
    """Whether a product with `norm` takes no longer for what it adds before: it waits for its weights anyway.

    Of an 8B layer on an H200, FP8 takes 10 us less where x is added elsewhere, four bits 5, bfloat16 nothing.
    """
    return isinstance(weight, Tensor) and few_rows.is_whole(x)


def _made_ready(
    h: Tensor, of_h: Weight, x: Tensor, norm: Norm, weight: Weight, gate: Weight | None, act: str, *, gate_first: bool
) -> tuple[Tensor, Ready] | None:
    """The total of one row, x and the product of h, and what the product behind its norm needs of it."""
    first, second = (gate, weight) if gate is not None or not act else _halves(weight, gate_first=gate_first)
    if (
        isinstance(of_h, Tensor)
        or isinstance(second, Tensor)
        or isinstance(first, Tensor)
        or of_h[0].shape[0] != x.numel()
    ):
        return None
    gate_held = None if first is None else Stored(*first[:6])
    return few_stored_rows.sum_for_norm(h, Stored(*of_h[:6]), x, norm[1], Stored(*second[:6]), gate_held)


def _by_kernel(
    x: Tensor, weight: Weight, bias: Tensor | None, gate: Weight | None, act: str, added: Tensor | None,
    norm: tuple[Tensor | None, float] | None, ready: Ready | None = None,
) -> Any:  # fmt: skip
    """None: no kernel takes these."""
    if added is not None and added.shape != x.shape:
        return None
    others = [each for each in (bias, added, None if norm is None else norm[0]) if each is not None]
    if isinstance(weight, Tensor):
        assert gate is None or isinstance(gate, Tensor)
        if not few_rows.takes(x, weight, *others, *(() if gate is None else (gate,))):
            return None
        return few_rows.few_rows(x, weight, bias, gate=gate, act=act, added=added, norm=norm)
    assert not isinstance(gate, Tensor)
    stored, other = Stored(*weight[:6]), None if gate is None else Stored(*gate[:6])
    if not few_stored_rows.takes(x, stored, other, *others):
        return None
    return few_stored_rows.few_rows(x, stored, bias, gate=other, act=act, added=added, norm=norm, ready=ready)


def _halves(both: Weight, *, gate_first: bool) -> tuple[Weight, Weight]:
    """The gate, and what it is multiplied with."""
    if isinstance(both, Tensor):
        first, second = both.chunk(2)
        return (first, second) if gate_first else (second, first)
    (codes, other_codes), (rows, other_rows) = both[0].chunk(2), both[3].chunk(2)
    one: StoredWeight = (codes, both[1], both[2], rows, *both[4:])
    other: StoredWeight = (other_codes, both[1], both[2], other_rows, *both[4:])
    return (one, other) if gate_first else (other, one)


def _linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, Tensor):
        return functional.linear(x, weight, bias)
    codes, scales, zeros, rows, columns, code, computed_in = weight
    return stored_linear(x, codes, scales, zeros, rows, columns, bias, code=code, computed_in=computed_in)


def _one_by_one(
    x: Tensor, weight: Weight, bias: Tensor | None, gate: Weight | None, act: str, added: Tensor | None,
    norm: Norm | None, *, gate_first: bool, scales: bool,
) -> Any:  # fmt: skip
    total = None
    if norm is not None:
        size, scale, eps = norm
        if added is not None:
            total, x = added_norm(x, added, size, scale, eps, scales=scales)
        elif scales:
            assert scale is not None
            x = scale * torch.rms_norm(x, size, None, eps)
        else:
            x = torch.rms_norm(x, size, scale, eps)
    y = _gated_product(x, weight, bias, gate, act, gate_first=gate_first)
    return y if added is None else (total, y)


def _gated_product(
    x: Tensor, weight: Weight, bias: Tensor | None, gate: Weight | None, act: str, *, gate_first: bool
) -> Tensor:
    first, second = (gate, weight) if gate is not None or not act else _halves(weight, gate_first=gate_first)
    if isinstance(second, Tensor):
        assert first is None or isinstance(first, Tensor)
        if takes_several(x, second, first, bias):
            made = several_rows(x, second, bias, gate=first, act=act)
            return made.view(*x.shape[:-1], made.shape[-1])
    y = _linear(x, weight, bias)
    if gate is not None:
        return gated(_linear(x, gate), y, act)
    if not act:
        return y
    of_first, of_second = y.chunk(2, -1)
    return gated(of_first, of_second, act) if gate_first else gated(of_second, of_first, act)
