"""Which tokens lie in each row of a cache whose rows ranks share out, and how much of a row another may take over.

    texts.begin(2, (0, 32))                    row 2 begins with the first 32 tokens of row 0
    texts.add(2, 32, tokens, dealt_out=True)   what a step has run of it
    texts.longest(tokens)                      the row that begins most like `tokens`, and how far

A row keeps its text when its sequence has ended, until another gets the row. Each rank copies what it has of a prefix
itself; nothing is sent. A prefix may end within a run whose tokens were dealt out, where some rank has more of it than
others, and what follows is dealt out evenly. So one that is too uneven is cut shorter: a rank has room for 1/n of the
longest text and some more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from runtime.ops.rows.token_order import TokenOrder

__all__ = ["RowTexts", "SharedOut", "alike"]

_AT_ONCE = 64
"""Tokens that are compared at once."""


@dataclass(frozen=True)
class SharedOut:
    """Blocks are rows whose tokens `parts` ranks share out. keeps: whether a row may take over a prefix of another."""

    parts: int
    keeps: bool = True
    uneven: int = 16
    """How many tokens more than its share of a prefix a rank may have."""
    least: int = 16
    """A prefix is a multiple of so many tokens."""


class _Ran(NamedTuple):
    """Tokens `start` to `stop`, which were dealt out, or came one by one (`width` 0)."""

    start: int
    stop: int
    width: int


@dataclass
class _Text:
    tokens: list[int] = field(default_factory=list)
    runs: list[_Ran] = field(default_factory=list)

    def first(self, count: int) -> _Text:
        runs = [each._replace(stop=min(each.stop, count)) for each in self.runs if each.start < count]
        return _Text(self.tokens[:count], runs)

    def counts(self, parts: int) -> list[int]:
        """How many of its tokens each rank has."""
        found = [0] * parts
        for start, stop, width in self.runs:
            for rank in range(parts):
                if width:
                    order = TokenOrder.of(width, parts)
                    found[rank] += sum(max(0, min(last, stop - start) - first) for first, last in order.runs[rank])
                else:
                    found[rank] += (stop - rank + parts - 1) // parts - (start - rank + parts - 1) // parts
        return found


class RowTexts:
    """See the module's docstring. Nothing here does I/O, and every rank that is told the same answers the same."""

    def __init__(self, given: SharedOut) -> None:
        self._given = given
        self._rows: dict[int, _Text] = {}

    def begin(self, row: int, source: tuple[int, int] | None) -> None:
        """A new text in `row`, of which the first so many tokens are those of a row, which may be the same one."""
        self._rows[row] = _Text() if source is None else self._rows[source[0]].first(source[1])

    def add(self, row: int, start: int, tokens: Sequence[int], *, dealt_out: bool) -> None:
        """What has been run of the text in `row`."""
        text = self._rows[row]
        if start != len(text.tokens):
            return  # a step before it was of a sequence that is no more
        text.tokens += tokens
        stop = start + len(tokens)
        if not dealt_out and text.runs and not text.runs[-1].width:
            text.runs[-1] = text.runs[-1]._replace(stop=stop)
        else:
            text.runs.append(_Ran(start, stop, len(tokens) if dealt_out else 0))

    def forget(self, row: int) -> None:
        self._rows.pop(row, None)

    def longest(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """A row, and how many of its first tokens are those of `tokens`, whose last one is run in any case."""
        best, least = (-1, 0), self._given.least
        for row, text in self._rows.items():
            count = alike(text.tokens, tokens, len(tokens) - 1) // least * least
            while count > best[1] and not self._is_even(text.first(count)):
                count -= least
            if count > best[1]:
                best = row, count
        return best if best[1] else None

    def _is_even(self, text: _Text) -> bool:
        parts = self._given.parts
        return max(text.counts(parts)) <= -(-len(text.tokens) // parts) + self._given.uneven


def alike(one: Sequence[int], other: Sequence[int], most: int) -> int:
    """How many of their first tokens are the same, `most` at most."""
    most = min(most, len(one), len(other))
    at = 0
    while at < most and one[at : min(at + _AT_ONCE, most)] == other[at : min(at + _AT_ONCE, most)]:
        at = min(at + _AT_ONCE, most)
    while at < most and one[at] == other[at]:
        at += 1
    return at
