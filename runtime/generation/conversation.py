"""The sequences of a group of rows as the host knows them: their tokens, which have ended, and what runs next.

    prompt_pieces(size)   [B, up to size] tokens at a time; shorter rows repeat their last token, at its position
                          alike: rows that take tokens take as many each, so that none of them repeats one
    next_piece()          [B, 1], the token learnt last
    learn(tokens)         what was chosen after the piece before

A repeated token writes to the cache what is there already, so padding reaches neither a cache nor another token.
Nothing here communicates: every rank that learns the same tokens knows the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from runtime.execution.prompts.piece import Piece
from runtime.generation.generation_request import GenerationRequest, Step
from runtime.sampling.token_edits import TokenEdits

__all__ = ["Conversation"]

T = TypeVar("T")


class Conversation:
    """The rows of a request, or a group of them, from their prompts to their last tokens."""

    def __init__(self, request: GenerationRequest, *, vocab_size: int, rows: slice = slice(None)) -> None:
        self.texts = [list(prompt) for prompt in request.prompts[rows]]
        """Prompts and what followed them; a sequence that has ended grows no more."""
        self.ended = [False] * len(self.texts)
        self.step = 0
        """How many tokens each sequence has been given, or would have been but for its end."""
        self.request_ids = list(request.settings.request_ids or range(len(request.prompts)))[rows]
        self._request = request
        self._watcher = request.watcher(vocab_size)

    @property
    def is_over(self) -> bool:
        return all(self.ended) or self.step == self._request.settings.max_new_tokens

    def prompt_pieces(self, size: int, *, alike: bool = False) -> Iterator[Piece]:
        """The prompts, `size` tokens at a time."""
        return self.pieces_between(range(size, max(map(len, self.texts)) + size, size), alike=alike)

    def pieces_between(self, ends: Iterable[int], *, alike: bool) -> Iterator[Piece]:
        """The prompts, from each of `ends` to the next; the last is no less than the longest prompt.

        alike: and from where a prompt ends, as a state counts a token that is repeated.
        """
        lengths = {len(text) for text in self.texts}
        start = 0
        for end in sorted(lengths | {end for end in ends if end < max(lengths)}) if alike else ends:
            # a prompt that is through repeats its last token at its position, which changes nothing
            starts = [min(start, len(text) - 1) for text in self.texts]
            yield Piece(
                [text[at:end] or text[at:] for text, at in zip(self.texts, starts, strict=True)],
                starts,
                active=tuple(start < len(text) for text in self.texts),
                completes=tuple(start < len(text) <= end for text in self.texts),
            )
            start = end

    def next_piece(self) -> Piece:
        """The last token of each row; one that has ended stays at its last token and position."""
        return Piece(
            [text[-1:] for text in self.texts],
            [len(text) - 1 for text in self.texts],
            active=tuple(not over for over in self.ended) if any(self.ended) else (True,) * len(self.ended),
        )

    def edits(self) -> TokenEdits | None:
        """Which tokens the next choice must and must not take. Once for each step, in their order."""
        return self._watcher.edits(self.texts, self.step + 1)

    def learn(self, tokens: Sequence[int], logprobs: Sequence[float] | None = None) -> Step:
        """Adds the tokens chosen for all rows; what those that have ended were given counts for nothing."""
        step = Step(_unless(self.ended, tokens), None if logprobs is None else _unless(self.ended, logprobs))
        self.step += 1
        ends, stops = self._request.settings.eos_token_id, self._request.stops is not None
        for row, token in enumerate(tokens):
            if not self.ended[row]:
                self.texts[row].append(token)
                if stops or token in ends:
                    self.ended[row] = self._request.has_ended(self.texts[row])
        return step


def _unless(ended: list[bool], values: Sequence[T]) -> tuple[T | None, ...]:
    if not any(ended) and len(values) == len(ended):
        return tuple(values)
    return tuple(None if over else value for value, over in zip(values, ended, strict=True))
