"""The tokens of one run of a group of rows, as the host knows them; its halves, and room for more of them.

On a GPU, what is prepared for the size of a piece serves all of about its length: plans of attention kernels, what
ranks have compared, captured graphs. So it has places for a few tokens more, and what stands in those comes after all
others. Only attention looks from one token at another, and none looks ahead; what these leave in the cache
lies where the next tokens of the row are written, before anybody looks there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.kv_cache.batch import PagedRows

__all__ = ["Piece", "halves_of", "last_of", "places", "row_sizes"]

_LEAST_PLACES, _PARTS = 64, 32
"""Places for tokens are multiples of the former, and of a part of the power of two below."""


@dataclass(frozen=True)
class Piece:
    """Tokens of a group for one run: those of each row, and the position of its first.

    active: rows that take tokens; the others repeat what they have.
    """

    tokens: list[list[int]]
    starts: list[int]
    active: tuple[bool, ...]
    completes: tuple[bool, ...] = ()
    """Rows whose prompt ends in this piece."""
    packed: bool = False
    """Whether the tokens of all stand behind each other in one row of the run, which yields those of `completes`."""

    def halves(self) -> tuple[Piece, Piece]:
        """Of several rows the first ones and the others; of one row its earlier tokens and its later ones."""
        if len(self.tokens) > 1:
            at = len(self.tokens) // 2
            first, second = (
                Piece(self.tokens[part], self.starts[part], self.active[part], self.completes[part])
                for part in (slice(at), slice(at, None))
            )
            return first, second
        (row,), (start,) = self.tokens, self.starts
        at = len(row) // 2
        return (
            Piece([row[:at]], [start], self.active, (False,)),
            Piece([row[at:]], [start + at], self.active, self.completes),
        )

    def parts(self, *, in_turns: bool) -> Sequence[Piece]:
        """Its halves where they take turns; otherwise itself."""
        return self.halves() if in_turns else (self,)

    def filled(self, size: int) -> Piece:
        """Each row with `size` tokens, the last one repeated at the positions that follow."""
        return replace(self, tokens=[row + row[-1:] * (size - len(row)) for row in self.tokens])


def places(tokens: int) -> int:
    """For how many tokens a captured piece of so many has room: one 32nd more at most, but for short ones."""
    step = max(_LEAST_PLACES, (1 << (tokens.bit_length() - 1)) // _PARTS)
    return -(-tokens // step) * step


def row_sizes(most: int) -> list[int]:
    """For how many rows there are captured steps, in ascending order: one, then powers of four up to `most`.

    Kernels are compiled for each, in seconds; a step of some rows more takes little longer, as it reads weights mostly.
    """
    return sorted({1, most, *(1 << power for power in range(0, (most - 1).bit_length(), 2))})


def last_of(parts: Sequence[Piece], last: list[int]) -> list[list[int]]:
    """By part of a piece, which token of each of its rows is the last; of one row's first half, any."""
    if len(parts) == 1:
        return [last]
    if len(last) == 1:
        at = len(parts[0].tokens[0])
        return [[at - 1], [last[0] - at]]
    at = len(parts[0].tokens)
    return [last[:at], last[at:]]


def halves_of(rows: slice | PagedRows | None, count: int) -> list[slice | PagedRows | None]:
    """The rows of a cache that halves of a piece of `count` rows are about."""
    if count == 1:
        return [rows, rows]
    at = count // 2
    if isinstance(rows, PagedRows):
        parts = slice(at), slice(at, None)
        return [PagedRows(rows.numbers[part], rows.tables[part]) for part in parts]
    start = 0 if rows is None else rows.start
    return [slice(start, start + at), slice(start + at, start + count)]
