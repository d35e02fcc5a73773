"""What is found in logits whose vocabulary is split: the likeliest token, the top m, the winner of a race with noise.

    logits of a rank       [B, owned]        own    [B, n], its share of them, which it searches
    likeliest(own)         local maximum                     one gather of [B, 2] numbers per rank
    top(own, m)            local top m                       one gather of [B, m, 2]
    race(own, best, ..)    noise for every local token       one gather of [B, 2], or of [B, 4]

All ranks along the axis call the same together, and all of them find the same: they decide from the same gathered
numbers. Nothing here waits for the device, and all shapes follow from those of the arguments, so that any of it may
stand in a captured step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from partitioner.errors import SamplingError
from partitioner.sharding.index_set import IndexSet
from runtime.communication.communicator import Communicator
from runtime.ops.collectives import all_gather
from runtime.ops.communicating import as_axes, axes_text
from runtime.program.rank_program import RankProgram
from runtime.sampling.candidates import rank_candidates, softmax_mass
from runtime.sampling.counter_random import gumbel
from runtime.sampling.likeliest.likeliest_tokens import best, largest, takes
from runtime.sampling.vocabulary_shards import Share, shares

__all__ = ["VocabularySearch", "joined", "require_finite"]

_PIECES = 256  # of a row, for each of which a GPU looks for the largest at once
_RACE_BYTES = 2**25  # of float64 noise at a time, which bounds the temporaries of an unfiltered step


class VocabularySearch:
    """One rank's part; `owned[i]` is what coordinate i along `axis` (one or several) holds of the vocabulary, as a
    layout's Split has it; None: each holds all of it.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        vocab_size: int,
        owned: Sequence[IndexSet] | None,
        axis: str | tuple[str, ...],
        device: torch.device,
    ) -> None:
        mesh, axes = communicator.mesh, as_axes(axis)
        coordinate = mesh.index(axes, mesh.coordinates(communicator.rank))
        if owned is None:
            owned = [IndexSet.range(0, vocab_size)] * mesh.size(*axes)
        if len(owned) != mesh.size(*axes):
            raise SamplingError(
                f"owned must say what each of {mesh.size(*axes)} ranks along {axes_text(axes)!r} holds, got "
                f"{len(owned)}"
            )
        parts = shares(owned, vocab_size)
        self.vocab_size = vocab_size
        self.share = Share(owned[coordinate], parts[coordinate], vocab_size=vocab_size, device=device)
        self.largest_size = max(part.size for part in parts)
        """The most columns that one rank searches."""
        self._is_alone = len(parts) == 1
        self._sizes = torch.tensor([part.size for part in parts], device=device)
        self.gather = communicator.bind(all_gather, axis, node="sampler", options={"dim": 0})
        """Of what each rank brings, [1, ..]."""

    @classmethod
    def of(cls, program: RankProgram, communicator: Communicator, device: torch.device) -> Self:
        """In the logits of a rank's program."""
        return cls(
            communicator,
            vocab_size=program.vocab_size,
            owned=program.vocabulary,
            axis=program.vocabulary_axes,
            device=device,
        )

    def likeliest(self, own: Tensor, *, scored: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, their logits in float64 or as they are, and log-probabilities where `scored`, [B] each."""
        largest, column = _largest(own)
        if not scored and self._is_alone:
            return self.share.tokens_at(column), largest, None
        message = [largest.double(), self.share.tokens[column].double()]
        if scored:
            message.append(softmax_mass(own, largest.double(), 1.0))
        values, tokens, *masses = self.gather(torch.stack(message, dim=1)[None]).unbind(dim=2)
        log_probabilities = -joined(masses[0], values, 1.0).log() if scored else None
        return _first_best(values, tokens)[0], values.amax(dim=0), log_probabilities

    def likeliest_told(self, own: Tensor) -> Tensor:
        """The same without log-probabilities, as `RowSampler.choose` tells it: [4, B] float64."""
        if takes(own):
            message = largest(own, self.share.tokens)
            return best(message if self._is_alone else self.gather(message))
        tokens, logits, _ = self.likeliest(own, scored=False)
        logits = logits.double()
        return torch.stack([tokens.double(), logits, torch.ones_like(logits), torch.zeros_like(logits)])

    def best(self, own: Tensor) -> Tensor:
        """The largest logit of each row, [B] float64; NaN where one of the row is."""
        found: Tensor = self.gather(own.amax(dim=1).double()[None]).amax(dim=0)
        return found

    def race(
        self, own: Tensor, best: Tensor, bits: Tensor, temperature: Tensor, *, scored: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens drawn from all of the vocabulary, and their log-probabilities where `scored`, [B] each.

        best: as above; bits, temperature: [B, 1].
        """
        # by the maximum of all: a token's chances must not be rounded by what else its rank holds
        rows = max(1, _RACE_BYTES // (8 * own.shape[1]))
        parts = zip(*(torch.split(x, rows) for x in (own, best, bits, temperature)), strict=True)
        mine = torch.cat([self._raced(*part, scored=scored) for part in parts])
        values, tokens, *scores = self.gather(mine[None]).unbind(dim=2)
        token, winner = _first_best(values, tokens)
        if not scored:
            return token, None
        logits, masses = scores
        return token, logits.gather(0, winner[None])[0] - masses.sum(dim=0).log()

    def _raced(self, own: Tensor, best: Tensor, bits: Tensor, temperature: Tensor, *, scored: bool) -> Tensor:
        """[b, 2] of this rank's winners: noisy logit and token; [b, 4] with their logits and the mass of all."""
        scaled = (own.double() - best[:, None]) / temperature
        noisy, column = (scaled + gumbel(bits, self.share.tokens)).max(dim=1)
        message = [noisy, self.share.tokens[column].double()]
        if scored:
            message += [scaled.gather(1, column[:, None])[:, 0], scaled.exp().sum(dim=1)]
        return torch.stack(message, dim=1)

    def top(
        self, own: Tensor, num: int, mass: Tensor | None, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The `num` largest logits of every rank with their tokens, ranked, [B, ranks * num].

        Then the floor [B] that no other logit exceeds, and the ranks' masses as that of the vocabulary [B]. mass: of
        this rank's share, [B], by `softmax_mass`.
        """
        values, columns = own.topk(min(num, own.shape[1]), dim=1)
        message = torch.full((len(own), num + (mass is not None), 2), -math.inf, dtype=torch.float64, device=own.device)
        message[:, : values.shape[1], 0] = values
        message[:, : values.shape[1], 1] = self.share.tokens[columns]
        if mass is not None:
            message[:, num, 0] = mass
        gathered = self.gather(message[None])
        values, tokens = gathered[:, :, :num].unbind(dim=3)
        floor = values[:, :, -1].masked_fill(self._sizes[:, None] <= num, -math.inf).amax(dim=0)
        total = None if mass is None else joined(gathered[:, :, num, 0], values[:, :, 0], temperature[:, 0])
        flat_values, flat_tokens = (x.transpose(0, 1).reshape(len(own), -1) for x in (values, tokens))
        logits, ranked = rank_candidates(flat_values, flat_tokens)
        return logits, ranked.clamp(min=0).long(), floor, total


def _largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`logits.max(dim=1)`: the largest of each row and where it first is."""
    few_rows = logits.device.type == "cuda" and logits.shape[0] * _PIECES < logits.shape[1]
    return _largest_of_pieces(logits) if few_rows else logits.max(dim=1)


def _largest_of_pieces(logits: Tensor) -> tuple[Tensor, Tensor]:
    # a GPU looks through a row with a single block of threads
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[1] % _PIECES), value=-math.inf)
    pieces = padded.reshape(len(padded), _PIECES, -1)
    values, columns = pieces.max(dim=2)
    largest, piece = values.max(dim=1)
    return largest, piece * pieces.shape[2] + columns.gather(1, piece[:, None])[:, 0]


def joined(masses: Tensor, largest: Tensor, temperature: float | Tensor) -> Tensor:
    """Masses [ranks, B], each relative to its rank's largest logit, as one relative to the largest of all.

    temperature: of each row, [B], or one.
    """
    return (masses * ((largest - largest.amax(dim=0)) / temperature).exp()).sum(dim=0)


def _first_best(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[ranks, B] of candidates -> the best one's token and rank; of equal ones the lowest token, as argmax has it."""
    ties = tokens.masked_fill(values < values.amax(dim=0), math.inf)
    token, rank = ties.min(dim=0)
    return token.long(), rank


def require_finite(best: Tensor) -> None:
    """`best`[B], the largest logit of each row; NaN where one of the row is."""
    values = best.tolist()
    if not all(map(math.isfinite, values)):
        row, value = next((row, value) for row, value in enumerate(values) if not math.isfinite(value))
        cause = "every logit is -inf" if value == -math.inf else f"its largest logit is {value}"
        raise SamplingError(
            f"no token can be chosen for row {row}: {cause}; the largest of each row must be finite. Look for an "
            f"overflow in the model's dtype, a mask that leaves nothing, or options that forbid every token"
        )
