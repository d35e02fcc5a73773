"""Steps of many requests that run one prompt beside single tokens, captured as CUDA graphs.

    ids, positions [1, R + T]    R rows of one token each, the last ones perhaps nobody's, then T tokens of a prompt
    last [R + 1]                 of each row, and of the prompt
    places [T]                   where the prompt's tokens lie in the blocks; those that fill it up where nobody reads
    received [1, R + T, ..]      on a stage, from the one before

A launch for each op takes the host ten times as long as a GPU needs for a few hundred tokens, and all rows wait for
that. One capture serves every step with up to R rows and a prompt of up to T tokens: rows are attended to by the
kernel for single tokens, which reads their positions and blocks where these lie; a prompt from its first token on sees
nothing of the cache. A prompt behind others of its own, or a second one beside it, runs op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.execution.prompts.captured_pieces import CapturedPieces, Made, Runnable
from runtime.execution.prompts.inputs import on_device
from runtime.execution.prompts.piece import Piece, places, row_sizes
from runtime.kv_cache.batch import Batch, PagedRows, Part
from runtime.kv_cache.paged_cache import PagedCache
from runtime.ops.kernels.triton_needs import replayed
from runtime.program.rank_program import RankProgram

__all__ = ["PackedPieces"]

_LEAST, _FEW = 64, 1 << 10
"""Tokens of a prompt up to which it is filled up to a power of two, from the former on."""
_OF_ALL_GROUPS = -1
"""Which rows of the cache these are about where groups of rows take turns: of a group like another."""


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

    def sizes(self, piece: Piece) -> tuple[int, int] | None:
        """For how many rows of one token each, and for how many tokens of a prompt, the run has room; None: it is none
        of these.
        """
        cache, counts = self._cache, [len(row) for row in piece.tokens]
        size = _size(counts[-1])
        fits = counts[-1] > 1 and not piece.starts[-1] and all(count == 1 for count in counts[:-1])
        if not fits or size > min(cache.step, cache.max_length):
            return None
        return next(each for each in row_sizes(cache.max_batch) if len(counts) - 1 <= each), size

    def __call__(self, piece: Piece, rows: PagedRows, received: Sequence[Tensor] = ()) -> Any:
        """Logits [n, 1, V/r] of the rows that are told, or what the stage hands on; of a piece that has `sizes`."""
        cache, sizes = self._cache, self.sizes(piece)
        assert sizes is not None
        batch, size = sizes
        cache.fix(PagedRows(rows.numbers[:-1], rows.tables[:-1]), batch, group=self._group)

        def varying() -> Sequence[Tensor]:
            return [*self._varying(piece, rows.tables[-1], batch, size), *received]

        def ready() -> Runnable:
            return self._ready(varying(), batch, size)

        table = cache.table(batch, group=self._group)
        made = self._pieces(
            ("packed", batch, size), place=tuple(x.data_ptr() for x in (*cache.buffers.values(), table)),
            first=ready, again=ready, varying=varying,
        )  # fmt: skip
        told = [at for at, is_told in enumerate(piece.completes[:-1]) if is_told]
        told += [batch] if piece.completes[-1] or not told else []
        places_told = on_device(told, self._execute.device)
        several = made if isinstance(made, tuple) else (made,)
        found = tuple(
            value if dim is None else value.index_select(dim, places_told)
            for value, dim in zip(several, self._yields, strict=True)
        )
        return found if isinstance(made, tuple) else found[0]

    def _varying(self, piece: Piece, table: Sequence[int], batch: int, size: int) -> list[Tensor]:
        """ids, positions, last, places."""
        cache, prompt, rest = self._cache, piece.tokens[-1], [0] * (batch + 1 - len(piece.tokens))
        missing = size - len(prompt)
        ids = [*(row[0] for row in piece.tokens[:-1]), *rest, *prompt, *[prompt[-1]] * missing]
        positions = [*piece.starts[:-1], *rest, *range(size)]
        block, nobody = cache.block_size, cache.blocks * cache.block_size
        taken = [table[at // block] * block + at % block for at in range(min(len(prompt), block * len(table)))]
        last = [*range(batch), batch + len(prompt) - 1]
        lie = taken + [nobody] * (size - len(taken))
        return [on_device(numbers, self._execute.device) for numbers in ([ids], [positions], last, lie)]

    def _ready(self, varying: Sequence[Tensor], batch: int, size: int) -> Runnable:
        ids, positions, last, lie, *received = varying
        cache = self._cache
        singles = Batch(positions[:, :batch].view(batch, 1), (cache.max_length - 1,) * batch, (1,) * batch)
        prompt = Batch(positions[:, batch:], (0,), (size,))
        table = cache.table(batch, group=self._group)
        parts = [
            Part(slice(0, batch), singles, PagedRows((), ()), tables={table.shape[1]: table}),
            Part(slice(batch, batch + size), prompt, PagedRows((), ()), places=lie),
        ]
        whole = Batch(positions, singles.starts + prompt.starts, singles.counts + prompt.counts, packed=True)
        known = {"input_ids": ids, "position_ids": positions, "last": last}
        values = [*(known[wanted.name] for wanted in self._execute.program.inputs), *received]

        def run(by: Callable[..., Any]) -> Made:
            cache.begin_parts(whole, parts)
            with replayed():
                found: Made = by(values)
            return found

        like = ("packed", batch, size)
        return Runnable(
            varying, lambda: None, lambda: run(lambda values: self._execute(values, like=like)),
            lambda: run(lambda values: self._execute.function(*values)),
        )  # fmt: skip


def _size(tokens: int) -> int:
    """For how many tokens of a prompt a capture has room."""
    return max(_LEAST, 1 << (tokens - 1).bit_length()) if tokens <= _FEW else places(tokens)
