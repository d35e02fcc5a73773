"""The filters that look at how surprising a token is, on candidates that are all there is left of the vocabulary.

    typical   the tokens whose information is nearest to the entropy, with that much mass    arXiv:2202.00666
    epsilon   those with that probability                                                    arXiv:2210.15191
    eta       the same, lower where the entropy is high                                      arXiv:2210.15191

logits [B, C], already divided by the temperature, -inf where a filter before has left nothing. In this order, which is
transformers', and the most probable token always stays where a cut-off would leave none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["cut_off"]


def cut_off(
    logits: Tensor,
    *,
    typical_p: float | Tensor | None,
    epsilon: float | Tensor | None,
    eta: float | Tensor | None,
) -> Tensor:
    """The same logits, -inf where a filter leaves nothing; None: without that one.

    As tensors [B, 1] they are each row's; there an infinite typical_p, and the others as 0, change nothing.
    """
    if typical_p is not None:
        logits = _typical(logits, typical_p)
    if epsilon is not None:
        logits = _at_least(logits, torch.as_tensor(epsilon, dtype=logits.dtype, device=logits.device))
    if eta is not None:
        entropy = _entropy(logits)
        most = torch.as_tensor(eta, dtype=logits.dtype, device=logits.device)
        logits = _at_least(logits, torch.minimum(most.sqrt() * (-entropy).exp(), most))
    return logits


def _entropy(logits: Tensor) -> Tensor:
    said = torch.log_softmax(logits, dim=1)
    return -(said.exp() * said).nansum(dim=1, keepdim=True)  # what is left out counts 0 * -inf


def _typical(logits: Tensor, mass: float | Tensor) -> Tensor:
    away = (-torch.log_softmax(logits, dim=1) - _entropy(logits)).abs()
    nearest, order = away.sort(dim=1)
    running = logits.gather(1, order).softmax(dim=1).cumsum(dim=1)
    last = (running < mass).sum(dim=1, keepdim=True).clamp(max=logits.shape[1] - 1)
    return logits.masked_fill(away > nearest.gather(1, last), -math.inf)


def _at_least(logits: Tensor, probability: Tensor) -> Tensor:
    improbable = logits.softmax(dim=1) < probability
    return logits.masked_fill(improbable & (logits < logits.amax(dim=1, keepdim=True)), -math.inf)
