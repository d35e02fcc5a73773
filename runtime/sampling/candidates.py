"""Which of the most probable tokens survive top-k, top-p and min-p, and whether enough of them were looked at.

    logits [B, C]   the candidates' logits, descending; ties by descending token     floor [B]   tokens that are no
    candidates have logits <= floor                                                  mass [B]    of the vocabulary

The survivors of every filter are the first few candidates of a row, so a number says which: transformers' processors in
their order, its ties included: all tokens that tie with the k-th stay; of those that tie at the edge of the nucleus the
highest indices stay, as its ascending sort has it on the CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["rank_candidates", "survivors"]


def rank_candidates(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Both [B, C], by descending logit and then descending token: one order, whichever ranks they came from."""
    order = tokens.argsort(dim=1, descending=True)
    logits, tokens = logits.gather(1, order), tokens.gather(1, order)
    logits, order = logits.sort(dim=1, descending=True, stable=True)
    return logits, tokens.gather(1, order)


def survivors(
    logits: Tensor,
    floor: Tensor,
    mass: Tensor | None,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor]:
    """How many candidates of each row survive, and for which rows that is certain.

    Where it is not (a tie with the k-th, or a part of the nucleus, may not be among the candidates), take more of them.
    `mass[B]`, asked for where top-p comes first: the sum over the vocabulary of exp((logit - largest) / temperature).
    """
    scaled = (logits - logits[:, :1]) / temperature
    kept = logits > -math.inf
    certain: Tensor | None = None
    if top_k is not None:
        kept &= logits >= logits[:, min(top_k, logits.shape[1]) - 1, None]
        certain = _certain(logits, kept, floor)
        mass = None
    if top_p is not None:
        running = scaled.exp().masked_fill(~kept, 0).cumsum(dim=1)
        total = running[:, -1] if mass is None else mass
        before = running.roll(1, dims=1)
        before[:, 0] = 0
        kept &= before < top_p * total[:, None]
        kept[:, 0] = True  # the most probable token stays, whatever top_p
        certain = _certain(logits, kept, floor) if certain is None else certain
    if min_p is not None:
        # the ratio to the largest probability: whatever was filtered before cancels
        kept &= scaled >= (math.log(min_p) if min_p > 0 else -math.inf)
        certain = _certain(logits, kept, floor) if certain is None else certain
    assert certain is not None, "without a filter there are no candidates to choose"
    return kept.sum(dim=1), certain


def _certain(logits: Tensor, kept: Tensor, floor: Tensor) -> Tensor:
    """The first filter decides: later ones only drop candidates that are known."""
    smallest = logits.masked_fill(~kept, math.inf).amin(dim=1)
    return (smallest > floor) | (floor == -math.inf)


def softmax_mass(logits: Tensor, largest: Tensor, temperature: float) -> Tensor:
    """The sum of exp((logit - largest) / temperature) over a rank's part of the vocabulary, in float64."""
    # a part without a finite logit has no mass; -inf - -inf would be nan
    base = torch.where(largest == -math.inf, 0, largest)
    return ((logits.double() - base[:, None]) / temperature).exp().sum(dim=1)
