"""Which of the most probable tokens survive top-k, top-p and min-p, and whether enough of them were looked at.

    logits [B, C]   the candidates' logits, descending; ties by descending token     floor [B]   tokens that are no
    candidates have logits <= floor                                                  mass [B]    of the vocabulary

The survivors of every filter are the first few candidates of a row, so a number says which: transformers' processors in
their order, its ties included: all tokens that tie with the k-th stay; of those that tie at the edge of the nucleus the
highest indices stay, as its ascending sort has it on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Filters", "log_ratio", "rank_candidates", "softmax_mass", "survivors"]


def rank_candidates(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Both [B, C], by descending logit and then descending token: one order, whichever ranks they came from."""
    order = tokens.argsort(dim=1, descending=True)
    logits, tokens = logits.gather(1, order), tokens.gather(1, order)
    logits, order = logits.sort(dim=1, descending=True, stable=True)
    return logits, tokens.gather(1, order)


@dataclass(frozen=True)
class Filters:
    """The filters of each row, as tensors [B, 1]; None: no row has one, so that nothing is computed for it."""

    temperature: Tensor
    """float64."""
    top_k: Tensor | None = None
    """int64; 0: off in this row."""
    top_p: Tensor | None = None
    """float64; infinite: off in this row."""
    min_p: Tensor | None = None
    """Its logarithm, float64; minus infinity: off in this row, or 0."""
    has_min_p: Tensor | None = None
    """bool; None: wherever there is a `min_p`."""

    @classmethod
    def alike(
        cls,
        batch: int,
        device: torch.device,
        *,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
    ) -> Filters:
        """The same in all rows."""

        def full(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.full((batch, 1), value, dtype=dtype, device=device)

        return cls(
            full(temperature),
            None if top_k is None else full(top_k, torch.int64),
            None if top_p is None else full(top_p),
            None if min_p is None else full(log_ratio(min_p)),
        )


def log_ratio(min_p: float) -> float:
    """The logarithm of a ratio of probabilities, which may be 0."""
    return math.log(min_p) if min_p > 0 else -math.inf


def survivors(logits: Tensor, floor: Tensor, mass: Tensor | None, filters: Filters) -> tuple[Tensor, Tensor]:
    """How many candidates of each row survive, and for which rows that is certain.

    Where it is not (a tie with the k-th, or a part of the nucleus, may not be among the candidates), take more of them.
    `mass[B]`, asked for where top-p comes first: the sum over the vocabulary of exp((logit - largest) / temperature).
    A row without a filter is certain where its candidates are all of the vocabulary.
    """
    scaled = (logits - logits[:, :1]) / filters.temperature
    kept = logits > -math.inf
    certain, decided = None, torch.zeros(len(logits), dtype=torch.bool, device=logits.device)

    def decide(certain: Tensor | None, decided: Tensor, has: Tensor | None) -> tuple[Tensor, Tensor]:
        """The first filter of a row decides: later ones only drop candidates that are known."""
        found = _certain(logits, kept, floor)
        certain = found if certain is None else torch.where(decided, certain, found)
        return certain, torch.ones_like(decided) if has is None else decided | has[:, 0]

    if filters.top_k is not None:
        has = filters.top_k > 0
        least = logits.gather(1, (filters.top_k - 1).clamp(0, logits.shape[1] - 1))
        kept &= (logits >= least) | ~has
        certain, decided = decide(certain, decided, has)
    if filters.top_p is not None:
        running = scaled.exp().masked_fill(~kept, 0).cumsum(dim=1)
        total = running[:, -1]
        if mass is not None:
            total = mass if filters.top_k is None else torch.where(filters.top_k[:, 0] > 0, total, mass)
        before = running.roll(1, dims=1)
        before[:, 0] = 0
        kept &= before < filters.top_p * total[:, None]
        kept[:, 0] = True  # the most probable token stays, whatever top_p
        certain, decided = decide(certain, decided, filters.top_p < math.inf)
    if filters.min_p is not None:
        # the ratio to the largest probability: whatever was filtered before cancels
        kept &= scaled >= filters.min_p
        certain, decided = decide(certain, decided, filters.has_min_p)
    if certain is None:
        certain, _ = decide(None, decided, None)
    return kept.sum(dim=1), certain


def _certain(logits: Tensor, kept: Tensor, floor: Tensor) -> Tensor:
    smallest = logits.masked_fill(~kept, math.inf).amin(dim=1)
    return (smallest > floor) | (floor == -math.inf)


def softmax_mass(logits: Tensor, largest: Tensor, temperature: float | Tensor) -> Tensor:
    """The sum of exp((logit - largest) / temperature) over a rank's part of the vocabulary, in float64.

    temperature: of each row, [B, 1], or one.
    """
    # a part without a finite logit has no mass; -inf - -inf would be nan
    base = torch.where(largest == -math.inf, 0, largest)
    return ((logits.double() - base[:, None]) / temperature).exp().sum(dim=1)
