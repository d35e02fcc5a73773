"""Choices of rows that ask for different things, made where their logits are: nothing waits for the host.

    rows = RowSampler(search, 8)                    for steps of 8 rows
    kind = rows.begin([RowOptions(...), ...])       the options of each, in tensors that stay where they are
    said = rows.choose(logits, kind)                [4, B] float64: tokens, best logits, certain, log-probabilities
    rows.advance(said, kind, ids, positions)        the tokens of the next choice follow these

What a choice computes depends on its `Kind` alone, so that a captured step serves all rows of a kind, whatever their
numbers. A row is told what `Sampler` would tell it, whose random numbers and filters these are. Top-k, top-p and min-p
look at a fixed number of candidates: where those were too few a row is not certain, and `Sampler` has to be asked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from runtime.sampling.candidates import Filters, log_ratio, softmax_mass, survivors
from runtime.sampling.counter_random import as_signed, gumbel, random_bits
from runtime.sampling.cutoffs import cut_off
from runtime.sampling.likeliest.likeliest_tokens import advance
from runtime.sampling.sampling_options import Sampling
from runtime.sampling.vocabulary_search import VocabularySearch

__all__ = ["Kind", "RowOptions", "RowSampler"]

_SPARE = 16
"""Candidates beyond the k-th, for those that tie with it: common in bfloat16."""
_LOOK = 1024
"""Candidates of each rank where mass or ratio says how many are needed."""
_LEAST = 64
_GREEDY, _UNFILTERED, _FILTERED = 0, 1, 2


@dataclass(frozen=True)
class RowOptions:
    """What a row asks of its next choice, number `step` of its request."""

    sampling: Sampling = field(default_factory=Sampling)
    request_id: int = 0
    step: int = 0
    scored: bool = False
    """Whether the log-probability is asked for."""
    text: Sequence[int] = ()
    """The tokens so far, where there is a repetition penalty."""
    written: Sequence[int] = ()
    """Those of them that are new, where there is a penalty for presence or frequency."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    """What single logits are raised by."""
    banned: tuple[int, ...] = ()

    asks: tuple[Sampling, bool, bool] = field(init=False, repr=False)
    """What the kind of a choice depends on; last: whether logits are changed before anything is chosen from them."""
    reals: tuple[float, ...] = field(init=False, repr=False)
    seed_bits: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        repeats = self.sampling.repetition_penalty != 1
        edits = repeats or self.presence_penalty or self.frequency_penalty or self.bias or self.banned
        object.__setattr__(self, "asks", (self.sampling, self.scored, bool(edits)))
        object.__setattr__(self, "reals", _reals_of(self))
        object.__setattr__(self, "seed_bits", as_signed(self.sampling.seed))

    def at(self, step: int, text: Sequence[int], written: Sequence[int]) -> RowOptions:
        """The same at another choice: what follows from the other options is not found out again."""
        other = object.__new__(RowOptions)
        vars(other).update(vars(self), step=step, text=text, written=written)
        return other


@dataclass(frozen=True)
class Kind:
    """What a choice has to compute, for any of its rows."""

    greedy: bool = False
    unfiltered: bool = False
    candidates: int = 0
    """How many of each rank, for rows with a filter or a cut-off."""
    mass: bool = False
    """Whether that of the whole vocabulary is asked for: by top-p, where no top-k comes first."""
    cutoffs: bool = False
    scored: bool = False
    edits: bool = False

    def join(self, other: Kind) -> Kind:
        """One that serves the rows of both."""
        both = {each.name: max(vars(self)[each.name], vars(other)[each.name]) for each in fields(self)}
        return Kind(**both)

    def covers(self, other: Kind) -> bool:
        return self.join(other) == self


class RowSampler:
    """See the module's docstring; for `batch` rows. whole: all of the vocabulary are candidates, so that every row is
    always certain.
    """

    def __init__(self, search: VocabularySearch, batch: int, device: torch.device, *, whole: bool = False) -> None:
        self._search, self._device, self._whole = search, device, whole
        self._numbers = torch.zeros(3, batch, dtype=torch.int64, device=device)
        self._reals = torch.zeros(_NUM_REALS, batch, dtype=torch.float64, device=device)
        self._edits: _Edits | None = None
        # of the latest rows, which are mostly those of the next choice too
        self._latest_reals: list[tuple[float, ...]] = []
        self._latest_asks: list[tuple[Sampling, bool, bool]] = []
        self._latest_kind = Kind()

    @property
    def changing(self) -> list[Tensor]:
        """What `advance` changes."""
        return [self._numbers, *([] if self._edits is None else self._edits.changing)]

    def begin(self, rows: Sequence[RowOptions], also: Sequence[RowOptions] = ()) -> Kind:
        """Takes the options of rows; those that are missing at the end choose as they like.

        also: rows of other ranks, which the kind must serve too, so that all take the same.
        """
        batch = self._numbers.shape[1]
        padded = [*rows, *[_NOTHING] * (batch - len(rows))]
        numbers = [
            [row.seed_bits for row in padded],
            [row.request_id for row in padded],
            [row.step for row in padded],
        ]
        self._copy(torch.tensor(numbers), self._numbers)
        reals = [row.reals for row in padded]
        if reals != self._latest_reals:
            self._copy(torch.tensor(reals, dtype=torch.float64).T.contiguous(), self._reals)
            self._latest_reals = reals
        asks = [row.asks for row in (*rows, *also)]
        if asks != self._latest_asks:
            kinds = {self._kind_of(*each) for each in asks}
            self._latest_kind = functools.reduce(Kind.join, kinds, Kind())
            self._latest_asks = asks
        kind = self._latest_kind
        if kind.edits and self._edits is None:
            self._edits = _Edits(self._search, batch, self._device)
        # a step of a joined kind looks at them for rows too that ask for none
        if self._edits is not None and (kind.edits or self._edits.holds_some):
            self._edits.begin(padded)
        return kind

    def is_certain(self, kind: Kind) -> bool:
        """Whether no row of such a choice can be uncertain."""
        return not kind.candidates or kind.candidates >= self._search.largest_size

    def choose(self, logits: Tensor, kind: Kind) -> Tensor:
        """[4, B] float64, from this rank's logits [B, owned]; all ranks along the axis call it together."""
        reals = self._reals
        own = self._search.share.of(logits)
        if kind.edits:
            assert self._edits is not None
            own = self._edits.applied(own, reals)
        way, found = reals[_WAY], None
        if kind.greedy or not (kind.unfiltered or kind.candidates):
            if kind.scored:
                found = _told(*self._search.likeliest(own, scored=True))
            else:
                found = self._search.likeliest_told(own)
        if not (kind.unfiltered or kind.candidates):
            assert found is not None
            return found
        bits = random_bits(*self._numbers)[:, None]
        if kind.unfiltered:
            best = self._search.best(own)
            temperature = reals[_TEMPERATURE, :, None]
            tokens, logprobs = self._search.race(own, best, bits, temperature, scored=kind.scored)
            found = _either(way == _UNFILTERED, _told(tokens, best, logprobs), found)
        if kind.candidates:
            found = _either(way == _FILTERED, self._among_candidates(own, bits, kind), found)
        assert found is not None
        return found

    def advance(self, said: Tensor, kind: Kind, ids: Tensor, positions: Tensor) -> None:
        """The next choice is that after `said`: ids [B, 1] become its tokens, and positions [B, 1] move on."""
        advance(said, ids, positions, self._numbers[2])
        if kind.edits:
            assert self._edits is not None
            self._edits.learn(said[0].long())

    def _kind_of(self, sampling: Sampling, scored: bool, edits: bool) -> Kind:
        way = _way(sampling)
        if way != _FILTERED:
            return Kind(greedy=way == _GREEDY, unfiltered=way == _UNFILTERED, scored=scored, edits=edits)
        filters = sampling.filters
        cutoffs = any(value is not None for value in sampling.cutoffs.values())
        whole = self._whole or all(value is None for value in filters.values())
        num = _LOOK if filters["top_k"] is None else filters["top_k"] + _SPARE
        num = max(_LEAST, 1 << (num - 1).bit_length())
        most = self._search.largest_size
        mass = filters["top_p"] is not None and filters["top_k"] is None
        return Kind(
            candidates=most if whole else min(num, most), mass=mass, cutoffs=cutoffs, scored=scored, edits=edits
        )

    def _among_candidates(self, own: Tensor, bits: Tensor, kind: Kind) -> Tensor:
        column = self._reals[:, :, None]
        filters = Filters(
            column[_TEMPERATURE],
            column[_TOP_K].long(),
            column[_TOP_P],
            column[_MIN_P],
            column[_HAS_MIN_P].bool(),
        )
        mass = softmax_mass(own, own.amax(dim=1).double(), filters.temperature) if kind.mass else None
        logits, tokens, floor, total = self._search.top(own, kind.candidates, mass, filters.temperature)
        kept, certain = survivors(logits, floor, total, filters)
        best = logits[:, 0]
        scaled = (logits - best[:, None]) / filters.temperature
        scaled = scaled.masked_fill(torch.arange(logits.shape[1], device=own.device) >= kept[:, None], -math.inf)
        if kind.cutoffs:
            scaled = cut_off(scaled, typical_p=column[_TYPICAL_P], epsilon=column[_EPSILON], eta=column[_ETA])
        winner = (scaled + gumbel(bits, tokens)).argmax(dim=1, keepdim=True)
        logprobs = scaled.gather(1, winner)[:, 0] - scaled.exp().sum(dim=1).log()
        return _told(tokens.gather(1, winner)[:, 0], best, logprobs, certain)

    def _copy(self, given: Tensor, kept: Tensor) -> None:
        if self._device.type == "cuda":
            given = given.pin_memory()
        kept.copy_(given, non_blocking=True)


(
    _WAY, _TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _HAS_MIN_P, _TYPICAL_P, _EPSILON, _ETA, _REPETITION, _PRESENCE,
    _FREQUENCY, _NUM_REALS,
) = range(13)  # fmt: skip


def _way(sampling: Sampling) -> int:
    if not sampling.do_sample:
        return _GREEDY
    narrowing = (*sampling.filters.values(), *sampling.cutoffs.values())
    return _UNFILTERED if all(value is None for value in narrowing) else _FILTERED


def _reals_of(row: RowOptions) -> tuple[float, ...]:
    """What is off is a number that changes nothing."""
    sampling = row.sampling
    filters, cutoffs = sampling.filters, sampling.cutoffs
    top_p, min_p, typical_p = filters["top_p"], filters["min_p"], cutoffs["typical_p"]
    return (
        _way(sampling),
        sampling.temperature,
        filters["top_k"] or 0,
        math.inf if top_p is None else top_p,
        -math.inf if min_p is None else log_ratio(min_p),
        min_p is not None,
        math.inf if typical_p is None else typical_p,
        cutoffs["epsilon"] or 0.0,
        cutoffs["eta"] or 0.0,
        sampling.repetition_penalty,
        row.presence_penalty,
        row.frequency_penalty,
    )


_NOTHING = RowOptions()


def _told(tokens: Tensor, best: Tensor, logprobs: Tensor | None, certain: Tensor | None = None) -> Tensor:
    sure = torch.ones_like(best) if certain is None else certain.double()
    return torch.stack([tokens.double(), best, sure, torch.zeros_like(best) if logprobs is None else logprobs])


def _either(here: Tensor, found: Tensor, other: Tensor | None) -> Tensor:
    return found if other is None else torch.where(here, found, other)


class _Edits:
    """What changes the logits of a rank's share before a choice; as `Sampler` and `TokenEdits` do it."""

    def __init__(self, search: VocabularySearch, batch: int, device: torch.device) -> None:
        self._share = search.share
        # one more column for tokens that are not this rank's
        shape = (batch, len(search.share.tokens) + 1)
        self._seen = torch.zeros(shape, dtype=torch.bool, device=device)
        self._times = torch.zeros(shape, dtype=torch.float32, device=device)
        self._bias = torch.zeros(shape, dtype=torch.float64, device=device)
        self._banned = torch.zeros(shape, dtype=torch.bool, device=device)
        self.holds_some = False
        """Whether rows that ask for nothing would be changed; tokens that were seen change nothing by themselves."""

    @property
    def changing(self) -> list[Tensor]:
        return [self._seen, self._times]

    def begin(self, rows: Sequence[RowOptions]) -> None:
        for kept in (self._seen, self._times, self._bias, self._banned):
            kept.zero_()
        self.holds_some = any(row.bias or row.banned for row in rows)
        self._seen[self._where(rows, "text")] = True
        self._banned[self._where(rows, "banned")] = True
        written = self._where(rows, "written")
        self._times.index_put_(written, self._times.new_ones(()), accumulate=True)
        pairs = [(at, token, amount) for at, row in enumerate(rows) for token, amount in row.bias]
        amounts = torch.tensor([amount for *_, amount in pairs], dtype=torch.float64, device=self._bias.device)
        self._bias[self._columns([(at, token) for at, token, _ in pairs])] = amounts

    def _where(self, rows: Sequence[RowOptions], name: str) -> tuple[Tensor, Tensor]:
        return self._columns([(at, token) for at, row in enumerate(rows) for token in vars(row)[name]])

    def _columns(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Rows and columns of pairs of a row and a token."""
        both = torch.tensor(pairs, dtype=torch.int64, device=self._seen.device).view(-1, 2)
        return both[:, 0], self._share.locate(both[:, 1])

    def learn(self, tokens: Tensor) -> None:
        columns = self._share.locate(tokens)[:, None]
        self._seen.scatter_(1, columns, True)
        self._times.scatter_add_(1, columns, torch.ones_like(columns, dtype=torch.float32))

    def applied(self, own: Tensor, reals: Tensor) -> Tensor:
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        repetition, presence, frequency = (reals[at, :, None] for at in (_REPETITION, _PRESENCE, _FREQUENCY))
        penalty = repetition.to(own.dtype)
        own = torch.where(self._seen[:, :-1], torch.where(own < 0, own * penalty, own / penalty), own)
        times = self._times[:, :-1].double()
        lowered = torch.where(times > 0, presence + frequency * times, 0.0)
        own = own + (self._bias[:, :-1] - lowered).to(own.dtype)
        return own.masked_fill(self._banned[:, :-1], -math.inf)
