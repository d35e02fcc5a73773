"""The next token of each sequence, from logits whose vocabulary is split over ranks; the same on every plan.

    greedy                     local maximum                   one gather of [B, 2] numbers per rank
    top-k, top-p, min-p        local top m, m a little over k  one gather of [B, m, 2]; another where m was too small
    typical, epsilon, eta      on what those leave             all logits, where none of those is asked for
    sampling without a filter  noise for every local token     two gathers: [B], then [B, 3]

Sampling is Gumbel-max (Maddison et al., arXiv:1411.0030, section 2): argmax of logit / temperature + noise, where the
noise is a function of (seed, request id, step, token) alone (`counter_random.py`). So neither the plan nor the
batch changes a token, and with a filter only its survivors need noise.

What of a choice depends on the split, given the same logits: nothing but the rounding of float64 logarithms (which may
differ in the last digit between places in a vector, and between kinds of device) and of top-p's sums, whose order is
the split's where no top-k comes before. So a race, or an edge of the nucleus, closer than about 1e-15 may fall either
way. All ranks decide from the same gathered numbers: on devices of one kind they always agree with each other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from partitioner.errors import SamplingError
from partitioner.sharding.index_set import IndexSet
from runtime.communication.communicator import Communicator
from runtime.sampling.candidates import Filters, rank_candidates, softmax_mass, survivors
from runtime.sampling.counter_random import gumbel, random_bits
from runtime.sampling.cutoffs import cut_off
from runtime.sampling.sampling_options import Sampling
from runtime.sampling.token_edits import TokenEdits
from runtime.sampling.vocabulary_search import VocabularySearch, joined, require_finite

__all__ = ["Sampler", "history_of"]

_SPARE = 16  # candidates beyond the k-th, for those that tie with it: common in bfloat16
_FIRST_LOOK = 128  # candidates of each rank where only mass or ratio says how many are needed
_GROWTH = 8  # how many times more are looked at when those were too few


class Sampler:
    """One rank's sampler; all ranks along `axis` (one or several) call theirs together, with the same arguments beside
    the logits.

    `owned[i]` is what coordinate i holds of the vocabulary, as a layout's Split has it; None: each holds all of it.
    Raises SamplingError on every rank where the largest logit of a row is not finite. Each call waits for the device.
    """

    def __init__(
        self,
        sampling: Sampling,
        communicator: Communicator,
        *,
        vocab_size: int,
        owned: Sequence[IndexSet] | None = None,
        axis: str | tuple[str, ...] = "tp",
        device: torch.device | str = "cpu",
    ) -> None:
        self.sampling = sampling
        self.search = VocabularySearch(
            communicator, vocab_size=vocab_size, owned=owned, axis=axis, device=torch.device(device)
        )

    def __call__(
        self,
        logits: Tensor,
        *,
        request_ids: Tensor,
        step: int | Tensor,
        history: Tensor | None = None,
        lengths: Tensor | None = None,
        edits: TokenEdits | None = None,
        scored: bool = False,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The next tokens [B], int64, from this rank's logits [B, owned] of each sequence's last position.

        request_ids[B] and step (a number or [B]) key the noise: same seed, id, step and logits, same token. With logits
        on a GPU they may be on the CPU, where hashing them is quicker.
        history[B, L] holds each row's tokens so far, of which the first lengths[B] count; only the repetition penalty
        asks for them. Ids outside the vocabulary, which the model cannot choose, are passed over there.
        edits: which tokens the choice must or must not take.
        seeds: of each row, in the place of the one seed of the options.
        scored: also the tokens' log-probabilities [B], float64, in the distribution that they were drawn from, which
        may be None otherwise. That is log_softmax of the processed logits, as transformers' compute_transition_scores
        has it with normalize_logits=True (its default leaves generate's `scores` unnormalised). Greedy search:
        temperature 1.
        """
        own = self.search.share.of(logits)
        batch = logits.shape[0]
        for name, given in (("request_ids", request_ids), ("step", step)):
            if isinstance(given, int):
                continue
            if given.shape != (batch,) or given.dtype != torch.int64:
                raise SamplingError(f"{name} must be int64 [{batch}], got {given.dtype} {list(given.shape)}")
        if not batch:
            return request_ids.new_empty(0, device=logits.device), logits.new_empty(0, dtype=torch.float64)
        own = self._penalised(own, history, lengths)
        own = own if edits is None else edits.applied(own, self.search.share)
        if not self.sampling.do_sample:
            return self._greedy(own, scored=scored)
        steps = step if isinstance(step, Tensor) else torch.full_like(request_ids, step)
        bits = random_bits(self.sampling.seed if seeds is None else seeds, request_ids, steps).to(logits.device)[
            :, None
        ]
        narrowing = {**self.sampling.filters, **self.sampling.cutoffs}
        if any(value is not None for value in narrowing.values()):
            return self._among_candidates(own, bits)
        return self._among_all(own, bits, scored=scored)

    def with_options(self, sampling: Sampling) -> Sampler:
        """Another one for the same ranks and logits."""
        other = copy.copy(self)
        other.sampling = sampling
        return other

    def _penalised(self, own: Tensor, history: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Repetition penalty (arXiv:1909.05858, 4.1), once per token: divide what is positive, multiply the rest."""
        penalty = self.sampling.repetition_penalty
        if penalty == 1:
            return own
        if history is None or lengths is None:
            raise SamplingError(f"repetition_penalty={penalty} needs history and lengths: the tokens so far")
        if history.dim() != 2 or not len(history) == len(lengths) == len(own):
            raise SamplingError(
                f"history must be [{len(own)}, length] and lengths [{len(own)}], "
                f"got {list(history.shape)} and {list(lengths.shape)}"
            )
        past = torch.arange(history.shape[1], device=history.device) >= lengths[:, None]
        columns = self.search.share.locate(history.masked_fill(past, -1))
        # one more column for tokens that are not this rank's; float32 as in transformers
        wide = torch.promote_types(own.dtype, torch.float32)
        padded = torch.cat([own.to(wide), torch.zeros(len(own), 1, dtype=wide, device=own.device)], dim=1)
        seen = padded.gather(1, columns)
        padded.scatter_(1, columns, torch.where(seen < 0, seen * penalty, seen / penalty))
        return padded[:, :-1]

    @property
    def is_plain(self) -> bool:
        """Whether `likeliest` says all that a choice depends on."""
        return not self.sampling.do_sample and self.sampling.repetition_penalty == 1

    def likeliest(self, logits: Tensor) -> list[int]:
        """The tokens of a greedy choice of plain options, without edits, on the host: as quick as can be."""
        tokens, best, _ = self.search.likeliest(self.search.share.of(logits), scored=False)
        require_finite(best)
        return tokens.tolist()

    def best(self, logits: Tensor) -> Tensor:
        """The likeliest tokens and their logits, [2, B] float64, without waiting for the device: see `chosen`."""
        tokens, best, _ = self.search.likeliest(self.search.share.of(logits), scored=False)
        return torch.stack([tokens.double(), best.double()])

    def chosen(self, best: Tensor) -> list[int]:
        """The tokens that `best` found, once it lies on the host."""
        require_finite(best[1])
        return [int(token) for token in best[0].tolist()]

    def top(self, logits: Tensor, tokens: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities by the model itself, before any option: [B, 1 + num] float64, and their tokens, int64.

        The first column is that of `tokens` [B]; then come the `num` most probable, descending, ties by descending
        token. Every rank calls it with the same arguments beside the logits [B, owned].
        """
        own = self.search.share.of(logits)
        num = min(num, self.search.vocab_size)
        values, columns = own.topk(min(num, own.shape[1]), dim=1)
        largest = own.amax(dim=1).double()
        message = torch.full((len(own), num + 1, 3), -math.inf, dtype=torch.float64, device=own.device)
        message[:, 0, 0], message[:, 0, 1] = largest, softmax_mass(own, largest, 1.0)
        wide = torch.cat([own.double(), own.new_full((len(own), 1), -math.inf, dtype=torch.float64)], dim=1)
        message[:, 0, 2] = wide.gather(1, self.search.share.locate(tokens)[:, None])[:, 0]
        message[:, 1 : values.shape[1] + 1, 0] = values
        message[:, 1 : values.shape[1] + 1, 1] = self.search.share.tokens[columns]
        gathered = self.search.gather(message[None])
        largest, masses, chosen = gathered[:, :, 0].unbind(dim=2)
        total = largest.amax(dim=0) + joined(masses, largest, 1.0).log()
        flat_values, flat_tokens = (gathered[:, :, 1:, at].transpose(0, 1).reshape(len(own), -1) for at in (0, 1))
        best, ranked = rank_candidates(flat_values, flat_tokens)
        found = torch.cat([chosen.amax(dim=0)[:, None], best[:, :num]], dim=1) - total[:, None]
        return found, torch.cat([tokens[:, None], ranked[:, :num].long()], dim=1)

    def _greedy(self, own: Tensor, *, scored: bool) -> tuple[Tensor, Tensor | None]:
        tokens, best, log_probabilities = self.search.likeliest(own, scored=scored)
        require_finite(best)
        return tokens, log_probabilities

    def _among_all(self, own: Tensor, bits: Tensor, *, scored: bool) -> tuple[Tensor, Tensor | None]:
        best = self.search.best(own)
        require_finite(best)
        return self.search.race(own, best, bits, self._temperatures(own), scored=scored)

    def _temperatures(self, own: Tensor) -> Tensor:
        # as a tensor: a GPU divides by a number by multiplying with its reciprocal, whose last digit may differ
        return torch.full((len(own), 1), self.sampling.temperature, dtype=torch.float64, device=own.device)

    def _among_candidates(self, own: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        given = self.sampling.filters
        filters = Filters.alike(len(own), own.device, temperature=self.sampling.temperature, **given)
        temperature, top_k = filters.temperature, given["top_k"]
        mass = None
        if top_k is None and given["top_p"] is not None:
            mass = softmax_mass(own, own.amax(dim=1).double(), temperature)
        num = _FIRST_LOOK if top_k is None else top_k + _SPARE
        if all(value is None for value in given.values()):  # a cut-off alone looks at all of the vocabulary
            num = self.search.largest_size
        while True:
            num = min(num, self.search.largest_size)
            logits, tokens, floor, total = self.search.top(own, num, mass, temperature)
            kept, certain = survivors(logits, floor, total, filters)
            best = logits[:, 0]
            # one wait for the device, for all that the host must know
            finite, enough, width = torch.stack([best.isfinite().all(), certain.all(), kept.max()]).tolist()
            if not finite:
                require_finite(best)
            if enough:
                break
            num *= _GROWTH
        scaled = (logits[:, :width] - best[:, None]) / temperature
        scaled = scaled.masked_fill(torch.arange(width, device=own.device) >= kept[:, None], -math.inf)
        scaled = cut_off(scaled, **self.sampling.cutoffs)
        winner = (scaled + gumbel(bits, tokens[:, :width])).argmax(dim=1, keepdim=True)
        return tokens.gather(1, winner)[:, 0], scaled.gather(1, winner)[:, 0] - scaled.exp().sum(dim=1).log()


def history_of(
    sampling: Sampling, texts: Sequence[list[int]], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """`history` and `lengths` as `Sampler` takes them, of each row's tokens so far; None where nobody asks for them."""
    if sampling.repetition_penalty == 1:
        return None, None
    lengths = torch.tensor([len(text) for text in texts], device=device)
    most = max(map(len, texts))
    return torch.tensor([text + [0] * (most - len(text)) for text in texts], device=device), lengths
