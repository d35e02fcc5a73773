"""The text of an answer while its tokens come: what is certain, where it stops, which token said what.

    text = AnswerText(tokenizer, prompt, stops)
    text.add(token)       the next one
    text.take()           what may be sent: no letter before all its bytes, nothing that may be part of a stop string
    text.stopped          a stop string is complete: the text ends before it
    text.end()            the rest, where it ended otherwise

Each token is decoded together with the few before it: alone, many drop the space that they begin with. So the work per
token does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

__all__ = ["AnswerText"]

_UNFINISHED = "\ufffd"
_BEFORE = 6  # tokens of the prompt that the first is decoded with
_MOST_PENDING = 8  # tokens of one letter: what is still no letter then is none


class AnswerText:
    """See the module's docstring. Stop strings are looked for in what is written, not in the prompt."""

    def __init__(
        self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = (), *, hidden: Collection[int] | None = None
    ) -> None:
        """hidden: tokens that are not written; None: those that the tokenizer calls special."""
        self._tokenizer, self._stops, self._hidden = tokenizer, tuple(stops), hidden
        self._window = list(prompt[-_BEFORE:])
        self._pending = 0
        """How many of the window's tokens are not in the text yet."""
        self._said = self._decoded(self._window)
        self.text = ""
        """All that is certain so far; cut before a stop string."""
        self.stopped = False
        self._sent = 0

    def add(self, token: int) -> str:
        """What the text has grown by: "" where a letter is not complete."""
        if self.stopped:
            return ""
        self._window.append(token)
        self._pending += 1
        whole = self._decoded(self._window)
        if whole.endswith(_UNFINISHED) and self._pending < _MOST_PENDING:
            return ""
        return self._grow(whole)

    def alone(self, token: int) -> str:
        """What another token would have added in the place of the last one: letters, or parts of one."""
        before = self._window[:-1]
        return self._decoded([*before, token])[len(self._decoded(before)) :]

    def take(self) -> str:
        """What has become certain since the last time, and is not the beginning of a stop string."""
        end = len(self.text) if self.stopped else len(self.text) - self._held()
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def end(self) -> str:
        """Nothing follows: what was held back, the bytes of an incomplete letter among it."""
        if not self.stopped:
            self._grow(self._decoded(self._window))
        piece = self.text[self._sent :]
        self._sent = len(self.text)
        return piece

    def _grow(self, whole: str) -> str:
        grown = whole[len(self._said) :]
        # the next token is decoded after these
        self._window = self._window[-max(self._pending, _BEFORE) :]
        self._said, self._pending = self._decoded(self._window), 0
        before = len(self.text)
        self.text += grown
        self._cut(before)
        return self.text[before:]

    def _cut(self, before: int) -> None:
        """Ends the text before the first stop string that is complete now."""
        found = [self.text.find(stop, max(before - len(stop) + 1, 0)) for stop in self._stops]
        places = [place for place in found if place >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True

    def _held(self) -> int:
        """Characters at the end that a stop string may begin with."""
        most = len(self.text) - self._sent
        return max((_begun(stop, self.text, min(len(stop) - 1, most)) for stop in self._stops), default=0)

    def _decoded(self, tokens: list[int]) -> str:
        hidden = self._hidden
        if hidden is not None:
            tokens = [token for token in tokens if token not in hidden]
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=hidden is None, clean_up_tokenization_spaces=False)
        )


def _begun(stop: str, text: str, most: int) -> int:
    """How many of the last `most` characters of a text are the beginning of `stop`."""
    at = text.find(stop[0], len(text) - most) if most > 0 else -1
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return len(text) - at if at >= 0 else 0
