"""The next tokens of rows whose requests ask for different things: one call of the sampler for rows that ask alike.

    asked = Asked(request)                  one row of a request, and what it has been told so far
    chooser.choose(logits[n, V/r], asked)   a `Choice` for each: a token, or why there is none

Seeds, request ids and steps are numbers of a row, so that they do not part rows. All ranks with the logits call it
together; where a row's logits are not finite, each row is asked for alone, so that the others get their tokens. On a
GPU all rows are asked for at once where that can be, as captured steps do it (`runtime.sampling.row_sampler`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from partitioner.errors import InputError, SamplingError
from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.generation.generation_request import GenerationRequest
from runtime.program.rank_program import RankProgram
from runtime.sampling.grammar import Grammars, among
from runtime.sampling.row_sampler import RowOptions, RowSampler
from runtime.sampling.sampler import Sampler, history_of
from runtime.sampling.sampling_options import Sampling
from runtime.sampling.token_edits import TokenEdits
from runtime.sampling.vocabulary_search import VocabularySearch

__all__ = ["Asked", "Choice", "RowChooser", "choice_of", "numbers_of"]

_MOST_SAMPLERS = 256
AT_ONCE_ON = frozenset({"cuda"})
"""Devices whose host takes longer to ask for rows one kind after the other than they to compute for all what some ask.
On a CPU, 64 rows that all draw from 50,000 tokens took 230 ms at once, 85 together."""


@dataclass(frozen=True)
class Choice:
    """token: -1 where there is none, for which `error` says why."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None
    """Where asked for: this token and the most probable ones, with their log-probabilities by the model alone."""
    error: InputError | SamplingError | None = None


def numbers_of(choice: Choice | None, named: int) -> list[float]:
    """As ranks tell each other: the token, its log-probability, then `named` pairs of the most probable ones; nan where
    there is none.
    """
    if choice is None:
        return [math.nan] * (2 + 2 * named)
    pairs = [value for pair in choice.top or () for value in pair]
    rest = [math.nan] * (2 * named - len(pairs))
    return [choice.token, math.nan if choice.logprob is None else choice.logprob, *pairs, *rest]


def choice_of(numbers: Sequence[float], *, whose: str) -> Choice:
    """What `numbers_of` was told of. whose: the logits that leave no token, where there is none."""
    token, logprob, *rest = numbers
    if token < 0:
        return Choice(-1, error=SamplingError(f"no token can be chosen: {whose} logits or rules leave none"))
    pairs = [(int(each), value) for each, value in zip(rest[::2], rest[1::2], strict=True) if not math.isnan(each)]
    return Choice(int(token), None if math.isnan(logprob) else logprob, tuple(pairs) or None)


class Asked:
    """A request of one row, as it stands."""

    def __init__(
        self,
        request: GenerationRequest,
        *,
        vocab_size: int,
        grammars: Grammars | None = None,
        given: Sequence[int] | None = None,
    ) -> None:
        """Raises InputError where its grammar cannot be used. given: the text whose tokens are taken, whatever is
        likely.
        """
        self.settings, self.given = request.settings, given
        self.text = list(request.prompts[0])
        self.step = 0
        """How many tokens it has been told."""
        ids = request.settings.request_ids
        self.request_id = ids[0] if ids else 0
        self.longest = request.longest
        self._request = request
        self._watcher = request.watcher(vocab_size)
        self.sampling = _alike(request.settings.sampling)
        self._vocab_size = vocab_size
        self._matcher = None
        if request.settings.grammar is not None:
            if grammars is None:
                raise InputError("a grammar needs to know what tokens say: launch(..., vocabulary=) tells the ranks")
            self._matcher = grammars.matcher(request.settings.grammar, ends=request.settings.eos_token_id)
        self._on_host = self._found_on_host()
        self._options = request.settings.row_options(self.text, 0, self.request_id)

    def edits(self) -> TokenEdits | None:
        """Which tokens the next choice must and must not take. Once for each step, in their order."""
        edits = self._watcher.edits([self.text], self.step + 1)
        if self._matcher is None:
            return edits
        bits = self._matcher.allowed()
        edits = replace(edits or TokenEdits(), allowed=((0, bits),))
        left = among(bits, torch.tensor(edits.forced or range(self._vocab_size)))
        out = [token for token in (*edits.banned, *(token for _, token in edits.pairs)) if token < self._vocab_size]
        if not edits.forced:
            left[out] = False
        if not left.any():
            raise InputError(
                f"the grammar and the options together leave no token for new token {self.step + 1}: leave out options "
                "that forbid or force tokens, or the grammar"
            )
        return edits

    @property
    def on_host(self) -> str:
        """The name of what it asks of its next choice that no step does by itself; "": nothing."""
        if self._on_host or self.step or not self.settings.rules.begin_suppress_tokens:
            return self._on_host
        return "begin_suppress_tokens"  # a step of single tokens chooses a first one too

    def _found_on_host(self) -> str:
        """Of what it asks of every choice."""
        if self.given is not None:
            return "tokens that are given"
        if self._matcher is not None:
            return "grammar"
        return "top_logprobs" if self.settings.top_logprobs is not None else self.settings.rules.on_host

    def row_options(self) -> RowOptions:
        """What it asks of its next choice, where nothing of it is the host's work."""
        return self.settings.at(self._options, self.text, self.step)

    def learn(self, token: int) -> bool:
        """Whether it ends with this token."""
        self.text.append(token)
        self.step += 1
        if self._matcher is not None:
            self._matcher.learn(token)
        return self.step == self.settings.max_new_tokens or self._request.has_ended(self.text)


class RowChooser:
    """See the module's docstring."""

    def __init__(
        self, program: RankProgram, communicator: Communicator, device: torch.device, profiler: Profiler
    ) -> None:
        self._program, self._communicator, self._device, self._profiler = program, communicator, device, profiler
        self._samplers: dict[Sampling, Sampler] = {}
        self._search: VocabularySearch | None = None
        self._row_samplers: dict[int, RowSampler] = {}
        """By the number of rows."""

    def choose(self, logits: Tensor, asked: Sequence[Asked]) -> list[Choice]:
        return self._at_once(logits, asked) or self._apart(logits, asked)

    def _at_once(self, logits: Tensor, asked: Sequence[Asked]) -> list[Choice] | None:
        """For all rows, whatever each asks for, as captured steps do; None where that cannot be, or is not certain."""
        if self._device.type not in AT_ONCE_ON or not asked or any(each.on_host for each in asked):
            return None
        options = [each.row_options() for each in asked]
        if any(row.asks[2] for row in options):
            return None  # logits that are changed take tables of the vocabulary, for each number of rows
        rows = self._row_sampler(len(asked))
        kind = rows.begin(options)
        said = self._profiler.timed("sampling", rows.choose)(logits, kind).cpu()
        if not (said[1].isfinite() & said[2].bool()).all():
            return None
        tokens, _, _, logprobs = said.tolist()
        return [
            Choice(int(token), logprob if each.settings.logprobs else None)
            for token, logprob, each in zip(tokens, logprobs, asked, strict=True)
        ]

    def _row_sampler(self, rows: int) -> RowSampler:
        if self._search is None:
            self._search = VocabularySearch.of(self._program, self._communicator, self._device)
        if rows not in self._row_samplers:
            self._row_samplers[rows] = RowSampler(self._search, rows, self._device)
        return self._row_samplers[rows]

    def _apart(self, logits: Tensor, asked: Sequence[Asked]) -> list[Choice]:
        """Rows that ask alike together."""
        found: list[Choice | None] = [None] * len(asked)
        parts: dict[tuple[Sampling, tuple[int, ...], bool], list[int]] = {}
        edits: list[TokenEdits | None] = []
        for row, each in enumerate(asked):
            try:
                edit = each.edits()
            except InputError as error:  # its rules leave no token
                found[row] = Choice(-1, error=error)
                edit = None
            edits.append(edit)
            if found[row] is None:
                forced = () if edit is None else edit.forced
                parts.setdefault((each.sampling, forced, each.given is not None), []).append(row)
        for (sampling, *_), rows in parts.items():
            choices = self._choose(sampling, logits, asked, edits, rows)
            for row, choice in zip(rows, choices, strict=True):
                found[row] = choice
        return [each for each in found if each is not None]

    def _choose(
        self,
        sampling: Sampling,
        logits: Tensor,
        asked: Sequence[Asked],
        edits: Sequence[TokenEdits | None],
        rows: list[int],
    ) -> list[Choice]:
        """For rows that ask alike."""
        try:
            return self._sampled(sampling, logits, asked, edits, rows)
        except SamplingError as error:
            if len(rows) == 1:
                return [Choice(-1, error=error)]
            return [self._choose(sampling, logits, asked, edits, [row])[0] for row in rows]

    def _sampled(
        self,
        sampling: Sampling,
        logits: Tensor,
        asked: Sequence[Asked],
        edits: Sequence[TokenEdits | None],
        rows: list[int],
    ) -> list[Choice]:
        mine = [asked[row] for row in rows]
        chosen = logits if len(rows) == len(logits) else logits[rows]
        known = [each.given[len(each.text)] for each in mine if each.given is not None]
        if known:
            scored, _ = self._sampler(sampling).top(chosen, torch.tensor(known, device=self._device), 1)
            return [Choice(token, logprob) for token, logprob in zip(known, scored[:, 0].tolist(), strict=True)]
        history, lengths = history_of(sampling, [each.text for each in mine], self._device)
        sample = self._profiler.timed("sampling", self._sampler(sampling))
        tokens, logprobs = sample(
            chosen,
            request_ids=torch.tensor([each.request_id for each in mine], device=self._device),
            step=torch.tensor([each.step for each in mine], device=self._device),
            history=history,
            lengths=lengths,
            edits=_together([edits[row] for row in rows]),
            scored=any(each.settings.logprobs for each in mine),
            seeds=[each.settings.sampling.seed for each in mine],
        )
        scores = [None] * len(mine) if logprobs is None else logprobs.tolist()
        tops = self._tops(sampling, chosen, tokens, mine)
        return [
            Choice(token, logprob if each.settings.logprobs else None, top)
            for token, logprob, top, each in zip(tokens.tolist(), scores, tops, mine, strict=True)
        ]

    def _tops(
        self, sampling: Sampling, logits: Tensor, tokens: Tensor, asked: Sequence[Asked]
    ) -> list[tuple[tuple[int, float], ...] | None]:
        wanted = [each.settings.top_logprobs for each in asked]
        most = max((each for each in wanted if each is not None), default=None)
        if most is None:
            return [None] * len(asked)
        values, named = self._sampler(sampling).top(logits, tokens, most)
        rows = zip(wanted, named.tolist(), values.tolist(), strict=True)
        return [
            None if num is None else tuple(zip(ids[: num + 1], scores[: num + 1], strict=True))
            for num, ids, scores in rows
        ]

    def _sampler(self, sampling: Sampling) -> Sampler:
        if sampling not in self._samplers:
            if len(self._samplers) >= _MOST_SAMPLERS:
                del self._samplers[next(iter(self._samplers))]
            if self._samplers:
                made = next(iter(self._samplers.values())).with_options(sampling)
            else:
                made = Sampler(
                    sampling,
                    self._communicator,
                    vocab_size=self._program.vocab_size,
                    owned=self._program.vocabulary,
                    axis=self._program.vocabulary_axes,
                    device=self._device,
                )
            self._samplers[sampling] = made
        return self._samplers[sampling]


def _alike(sampling: Sampling) -> Sampling:
    """The options without what is said row by row, or not read."""
    if not sampling.do_sample:
        return Sampling(repetition_penalty=sampling.repetition_penalty)
    return replace(sampling, seed=0)


def _together(edits: Sequence[TokenEdits | None]) -> TokenEdits | None:
    """The edits of several rows as those of one batch; what is forced is the same for all."""
    if not any(edits):
        return None
    forced = edits[0].forced if edits[0] is not None else ()
    pairs = {
        (row, token)
        for row, edit in enumerate(edits)
        if edit is not None
        for token in (*edit.banned, *(token for _, token in edit.pairs))
    }
    added = [
        (row, token, amount) for row, edit in enumerate(edits) if edit is not None for _, token, amount in edit.added
    ]
    allowed = [(row, bits) for row, edit in enumerate(edits) if edit is not None for _, bits in edit.allowed]
    return TokenEdits(forced, (), tuple(sorted(pairs)), tuple(added), tuple(allowed))
