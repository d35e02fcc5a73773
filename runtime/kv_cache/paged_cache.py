"""A cache in blocks: the tokens of a sequence lie in any blocks, which a table names in the order of their positions.

    buffer        [.., blocks + 1, block size, dim]   per state that keeps tokens; before it the state's other dims
    table         of a row of the run: its blocks; position p lies in block table[p // size], at p % size
    a state per sequence: [rows, ...], by the row's number

Several rows may name one block, so a prefix that they share lies there once (PagedAttention, arXiv:2309.06180, section
4.1). The last block takes the place of those that a shorter row does not have, and what nobody is to read. Layers with
a window keep all tokens here, for their blocks are those of the other layers.

Attention of many tokens, and on a CPU of one, gathers a row's blocks; the kernel for one token on a GPU reads them
where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.kv_cache.batch import Batch, PagedRows
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.untouched import untouched_zeros
from runtime.ops.attention import attention
from runtime.ops.kernels.flash_attention import flash_rows
from runtime.program.shards import StateShard

__all__ = ["PagedCache"]


class PagedCache(Cache):
    """`blocks` of `block_size` tokens for any number of sequences, and states per sequence for `max_batch` of them.

    max_length: of the longest sequence. step: the most tokens of a row in one run.
    """

    def __init__(
        self,
        states: Sequence[StateShard],
        *,
        blocks: int,
        block_size: int,
        max_batch: int,
        max_length: int,
        step: int,
        device: torch.device,
    ) -> None:
        self.blocks, self.block_size = blocks, block_size
        super().__init__(states, max_batch=max_batch, max_length=max_length, step=step, device=device)
        self._paged = PagedRows((), ())
        self._row_numbers = torch.zeros(0, dtype=torch.int64, device=device)
        self._tables: dict[int, Tensor] = {}
        """By their width: of the run's rows [B, width]."""
        self._places: Tensor | None = None
        """Where the run's tokens lie, as if all blocks were one: [B * S]."""

    def resize(self, *, max_batch: int, max_length: int, step: int, slots: int = 0) -> None:
        self.max_batch, self.max_length, self.step = max_batch, max_length, step
        self.buffers = {
            state.name: untouched_zeros(self._shape(state), dtype=state.dtype, device=self._device)
            for state in self._states
        }
        self._remembered = {s.name: self.buffers[s.name].shape for s in self._states if not s.per_token}
        self._used = self._replayed = 0
        self._rows = torch.arange(max_batch, device=self._device)[:, None]

    def _shape(self, state: StateShard) -> tuple[int, ...]:
        if not state.per_token:
            return (self.max_batch, *state.shape)
        return (*state.shape[:-1], self.blocks + 1, self.block_size, state.shape[-1])

    def start(self, rows: slice | None = None) -> None:
        """Nothing: a row that starts at its first token remembers nothing, and no token reads another's blocks."""

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeros in blocks whose numbers were no numbers: even what is hidden is multiplied by 0."""
        for state in self._states:
            if state.per_token and blocks:
                self.buffers[state.name][..., list(blocks), :, :] = 0

    def begin(self, tokens: Batch, *, rows: slice | PagedRows | None = None, decode: bool = False) -> None:
        if not isinstance(rows, PagedRows) or len(rows.numbers) != len(tokens.starts):
            raise InputError("a run over a cache in blocks says which rows it is about, and which blocks each has")
        super().begin(tokens, rows=slice(0, len(rows.numbers)))
        self._paged = rows
        self._row_numbers = torch.tensor(rows.numbers, device=self._device)
        self._tables.clear()
        self._places = None

    def _table(self, count: int) -> Tensor:
        """The first blocks of each row, for `count` tokens: [B, count / block size]."""
        width = -(-count // self.block_size)
        if width not in self._tables:
            rest = (self.blocks,) * width
            padded = [(table[:width] + rest)[:width] for table in self._paged.tables]
            self._tables[width] = torch.tensor(padded, device=self._device)
        return self._tables[width]

    def _put(self, buffer: Tensor, x: Tensor) -> None:
        """Keeps `x` [B, .., S, D] of the run's tokens."""
        if self._places is None:
            assert self._batch is not None
            positions = self._batch.positions
            blocks = self._table(self._batch.end).gather(1, positions // self.block_size)
            self._places = (blocks * self.block_size + positions % self.block_size).view(-1)
        buffer.flatten(-3, -2).index_copy_(-2, self._places, x.movedim(0, -3).flatten(-3, -2))

    def _get(self, buffer: Tensor, count: int) -> Tensor:
        """What the rows' first `count` positions hold, [B, .., count, D]."""
        single = self._paged.tables[0]
        width = -(-count // self.block_size)
        if len(self._paged.tables) == 1 and len(single) >= width:
            first = single[0]
            if single[:width] == tuple(range(first, first + width)):  # they lie one after the other: no copy
                start = first * self.block_size
                return buffer.flatten(-3, -2)[None, ..., start : start + count, :]
        table = self._table(count)
        found = buffer.index_select(-3, table.view(-1))
        *lead, _, size, width = found.shape
        return found.view(*lead, len(table), table.shape[1] * size, width).movedim(-3, 0)[..., :count, :]

    def _attend(
        self,
        keys: Tensor,
        values: Tensor,
        options: dict[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self._put(keys, k)
        self._put(values, v)
        tokens = self._batch
        assert tokens is not None
        if tokens.start == 0:
            return attention(q, k, v, mask, sinks, **options)
        found = self._get(keys, tokens.end), self._get(values, tokens.end)
        plain = mask is None and sinks is None and options["causal"]
        plain = plain and all(options[name] is None for name in ("softcap", "chunk", "kv_map"))
        if plain and self._can_flash(q, v, self.max_length, options["window"]):
            scale, window = options["scale"], options["window"]
            return flash_rows(q, *found, tokens.starts, tokens.counts, scale=scale, window=window)
        hidden = self._hidden(tokens.end, self.max_length, options["window"], options["chunk"], q.dtype)
        if hidden is not None:
            mask = hidden if mask is None else mask.to(q.dtype) + hidden
        given = {name: options[name] for name in ("scale", "softcap", "kv_map")}
        return attention(q, *found, mask, sinks, **given)

    def _append(self, state: str, x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        self._put(self.buffers[state], x)
        return self._get(self.buffers[state], len(slots))

    def _read(self, state: str, batch: Tensor) -> Tensor:
        tokens = self._batch
        assert tokens is not None
        held = self.buffers[state][self._row_numbers]
        for at, start in enumerate(tokens.starts):
            if start == 0:  # another sequence had this row before
                held[at] = 0
        return held

    def _write(self, state: str, value: Tensor, active: Tensor) -> Tensor:
        self.buffers[state][self._row_numbers] = value
        return value
