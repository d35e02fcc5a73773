"""A linear whose weight is int8 with one scale per output channel, and how both are made of the model's weight.

x [.., K]   codes int8 [N, K]   scales [N]   bias [N]   ->   (x @ codes.T) * scales + bias   [.., N]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from partitioner.plugin import Notation, Operand, is_tensor, layout_rule, letters, value_of

LARGEST = 127


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """See the module's docstring."""
    y = functional.linear(x, codes.to(x.dtype)) * scales.to(x.dtype)
    return y if bias is None else y + bias


@layout_rule(int8_linear)
def _int8_linear(node: fx.Node, a: dict[str, Any]) -> Notation:
    """x[.. k] codes[n k] scales[n] bias[n] -> [.. n], k summed; a product of three, plus a bias."""
    lead = letters(len(value_of(a["x"]).shape) - 1)
    operands = [Operand(a["x"], (*lead, "k")), Operand(a["codes"], ("n", "k")), Operand(a["scales"], ("n",))]
    terms = [frozenset((0, 1, 2))]
    if is_tensor(a["bias"]):
        operands.append(Operand(a["bias"], ("n",)))
        terms.append(frozenset((3,)))
    return Notation(tuple(operands), ((*lead, "n"),), sums=frozenset("k"), terms=tuple(terms))


def make_scales(weight: Tensor) -> Tensor:
    """What one step of each row's codes stands for [N]; of the whole row, also where ranks hold parts of it."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scales = exact.abs().amax(dim=1) / LARGEST
    return torch.where(scales > 0, scales, 1.0)


def make_codes(weight: Tensor) -> Tensor:
    """The nearest int8 [N, K]."""
    scales = make_scales(weight)
    return torch.round(weight.to(scales.dtype) / scales[:, None]).to(torch.int8)
