"""Steps of many requests that run one prompt beside single tokens, captured as CUDA graphs.

    ids, positions [1, R + T]    R rows of one token each, the last ones perhaps nobody's, then T tokens of a prompt
    last [R + 1]                 of each row, and of the prompt
    places [T]                   where the prompt's tokens lie in the blocks; those that fill it up where nobody reads
    table [1, ..], lengths       where a prompt stands behind others of its own, of P tokens at most: the blocks of all,
                                 and as `Batch.behind` has it
    received [1, R + T, ..]      on a stage, from the one before

A launch for each op takes the host ten times as long as a GPU needs for a few hundred tokens, and all rows wait for
that. One capture serves every step with up to R rows and a prompt of up to T tokens: rows are attended to by the
kernel for single tokens, which reads their positions and blocks where these lie; a prompt from its first token on sees
nothing of the cache, and one behind up to P tokens of its own sees these where its blocks lie. A second prompt beside
it runs op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from runtime.execution.prompts.captured_pieces import CapturedPieces, Made, Runnable
from runtime.execution.prompts.inputs import on_device
from runtime.execution.prompts.piece import Piece, places, row_sizes
from runtime.kv_cache.batch import Batch, PagedRows, Part
from runtime.kv_cache.paged_cache import PagedCache
from runtime.ops.kernels.triton_needs import replayed
from runtime.program.rank_program import RankProgram

__all__ = ["PackedPieces", "Room"]

_LEAST, _FEW = 64, 1 << 10
"""Tokens of a prompt up to which it is filled up to a power of two, from the former on."""
_LEAST_PAST = 256
_OF_ALL_GROUPS = -1
"""Which rows of the cache these are about where groups of rows take turns: of a group like another."""


class Room(NamedTuple):
    """Rows of one token each, tokens of a prompt, and of what it has in the cache before them."""

    rows: int
    tokens: int
    past: int


class Runs(Protocol):
    """The program for prompts, ready to run; as `Executable` has it."""

    program: RankProgram
    device: torch.device

    @property
    def function(self) -> Callable[..., Any]: ...

    def __call__(self, values: Sequence[Tensor], *, like: Hashable = None) -> Any: ...


class PackedPieces:
    """Those of one rank over one cache, all of whose attention has a kernel for single tokens.

    pieces: what holds their captures. yields: which dim of what a run yields has its rows; None: it yields tokens. On a
    stage, of each value that it hands on.
    """

    def __init__(
        self, execute: Runs, cache: PagedCache, pieces: CapturedPieces, *, yields: Sequence[int | None] = (0,)
    ) -> None:
        self._execute, self._cache, self._pieces, self._yields = execute, cache, pieces, yields
        self._group = 0 if execute.program.stage is None else _OF_ALL_GROUPS

    def room_of(self, piece: Piece) -> Room | None:
        """For what the captured run has room; None: it is none of these."""
        cache, counts = self._cache, [len(row) for row in piece.tokens]
        start, size = piece.starts[-1], _size(counts[-1])
        most = cache.max_length - size
        if counts[-1] == 1 or any(count > 1 for count in counts[:-1]) or size > cache.step or start > most:
            return None
        rows = next(each for each in row_sizes(cache.max_batch) if len(counts) - 1 <= each)
        return Room(rows, size, min(_past(start), most) if start else 0)

    def __call__(self, piece: Piece, rows: PagedRows, received: Sequence[Tensor] = ()) -> Any:
        """Logits [n, 1, V/r] of the rows that are told, or what the stage hands on; of a piece that has a `room_of`."""
        cache, room = self._cache, self.room_of(piece)
        assert room is not None
        cache.fix(PagedRows(rows.numbers[:-1], rows.tables[:-1]), room.rows, group=self._group)

        def varying() -> Sequence[Tensor]:
            return [*self._varying(piece, rows.tables[-1], room), *received]

        def ready() -> Runnable:
            return self._ready(varying(), room)

        table = cache.table(room.rows, group=self._group)
        made = self._pieces(
            ("packed", *room), place=tuple(x.data_ptr() for x in (*cache.buffers.values(), table)),
            first=ready, again=ready, varying=varying,
        )  # fmt: skip
        told = [at for at, is_told in enumerate(piece.completes[:-1]) if is_told]
        told += [room.rows] if piece.completes[-1] or not told else []
        places_told = on_device(told, self._execute.device)
        several = made if isinstance(made, tuple) else (made,)
        found = tuple(
            value if dim is None else value.index_select(dim, places_told)
            for value, dim in zip(several, self._yields, strict=True)
        )
        return found if isinstance(made, tuple) else found[0]

    def _varying(self, piece: Piece, table: Sequence[int], room: Room) -> list[Tensor]:
        """ids, positions, last, places; where there is a past, the prompt's blocks and lengths."""
        cache, prompt, start = self._cache, piece.tokens[-1], piece.starts[-1]
        rest = [0] * (room.rows + 1 - len(piece.tokens))
        ids = [*(row[0] for row in piece.tokens[:-1]), *rest, *prompt, *[prompt[-1]] * (room.tokens - len(prompt))]
        positions = [*piece.starts[:-1], *rest, *range(start, start + room.tokens)]
        size, nobody = cache.block_size, cache.blocks * cache.block_size
        stop = min(start + len(prompt), size * len(table))
        taken = [table[at // size] * size + at % size for at in range(start, stop)]
        last = [*range(room.rows), room.rows + len(prompt) - 1]
        numbers: list[Any] = [[ids], [positions], last, taken + [nobody] * (room.tokens - len(taken))]
        found = [on_device(each, self._execute.device) for each in numbers]
        if room.past:
            width = self._width(room)
            found.append(on_device([(*table[:width], *[cache.blocks] * (width - len(table)))], self._execute.device))
            lengths = [[0, room.tokens], [0, start + room.tokens]]
            found.append(on_device(lengths, self._execute.device).to(torch.int32))
        return found

    def _width(self, room: Room) -> int:
        """Blocks of the prompt's row."""
        return -(-(room.past + room.tokens) // self._cache.block_size)

    def _ready(self, varying: Sequence[Tensor], room: Room) -> Runnable:
        ids, positions, last, lie, *others = varying
        cache, rows, size = self._cache, room.rows, room.tokens
        tables, lengths = {}, None
        if room.past:
            own, lengths, *others = others
            tables = {self._width(room): own}
        singles = Batch(positions[:, :rows].view(rows, 1), (cache.max_length - 1,) * rows, (1,) * rows)
        prompt = Batch(positions[:, rows:], (room.past,), (size,), behind=lengths)
        table = cache.table(rows, group=self._group)
        parts = [
            Part(slice(0, rows), singles, PagedRows((), ()), tables={table.shape[1]: table}),
            Part(slice(rows, rows + size), prompt, PagedRows((), ()), tables=tables, places=lie),
        ]
        whole = Batch(positions, singles.starts + prompt.starts, singles.counts + prompt.counts, packed=True)
        known = {"input_ids": ids, "position_ids": positions, "last": last}
        values = [*(known[wanted.name] for wanted in self._execute.program.inputs), *others]

        def run(by: Callable[..., Any]) -> Made:
            for part in parts:
                part.masks.clear()  # which a graph has to make anew from positions
            cache.begin_parts(whole, parts)
            with replayed():
                found: Made = by(values)
            return found

        like = ("packed", *room)
        return Runnable(
            varying, lambda: None, lambda: run(lambda values: self._execute(values, like=like)),
            lambda: run(lambda values: self._execute.function(*values)),
        )  # fmt: skip


def _past(tokens: int) -> int:
    """For how many tokens before those of a prompt a capture has room; each size is captured by itself."""
    return max(_LEAST_PAST, 1 << 2 * -(-(tokens - 1).bit_length() // 2))


def _size(tokens: int) -> int:
    """For how many tokens of a prompt a capture has room."""
    return max(_LEAST, 1 << (tokens - 1).bit_length()) if tokens <= _FEW else places(tokens)
