"""A cache in blocks: the tokens of a sequence lie in any blocks, which a table names in the order of their positions.

    buffer        [.., blocks + 1, block size, dim]   per state that keeps tokens; before it the state's other dims
    table         of a row of the run: its blocks; position p lies in block table[p // size], at p % size
    a state per sequence: [rows, ...], by the row's number

Several rows may name one block, so a prefix that they share lies there once (PagedAttention, arXiv:2309.06180, section
4.1). The last block takes the place of those that a shorter row does not have, and what nobody is to read: so, too, of
those behind what a token sees, where all layers have windows. Where some have none, those with a window keep all tokens
here, for their blocks are those of the other layers.

Attention of many tokens, and on a CPU of one, gathers a row's blocks; the kernel for one token on a GPU reads them
where they lie. Rows whose tokens are packed behind each other are attended to in parts that take as many tokens each;
so are, on a CPU, rows of very different lengths, all of which would else be read as far as the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.kv_cache.batch import Batch, PagedRows, Part, together
from runtime.kv_cache.buffers import buffers_of, parts_of
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.slots import minus_infinity
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention
from runtime.ops.kernels.flash_attention import can_flash, flash_attention, flash_behind, flash_rows
from runtime.ops.state.latent_attention import latent_attention
from runtime.program.shards import StateShard

__all__ = ["PagedCache"]

_PREPARED_FROM = 1024
"""Tokens of a row from which torch may choose a kernel that is prepared for every number of them."""
_PART_BYTES = 1 << 18
"""Of keys that are gathered in vain sooner than that there is another part: what its calls take to start."""
_DIMS = (2, 2, 2)
"""Of queries, keys and values."""
_LATENT_DIMS = (2, 2, 1, 1, None, None)
"""Of the operands of `latent_attention`."""
_NAMED = ("mask", "sinks")


class PagedCache(Cache):
    """`blocks` of `block_size` tokens for any number of sequences, and states per sequence for `max_batch` of them.

    max_length: of the longest sequence. step: the most tokens of a row in one run.
    """

    _OF_RUN = (*Cache._OF_RUN, "_paged", "_row_numbers", "_tables", "_places", "_parts")

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
        self._parts: list[Part] = []
        """Of the run's rows, where attention does not take all of them together."""
        # on a GPU another part costs the launches of its kernels
        bytes_each = max((state.bytes for state in states if state.per_token), default=0)
        self._worth = _PART_BYTES / bytes_each if bytes_each and device.type == "cpu" else math.inf
        self._fixed_tables: dict[tuple[int, int], Tensor] = {}
        """By number of rows and group, for runs from fixed memory: [B, blocks of the longest row]."""
        self._fixed_rows: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        """What these hold."""
        self._fixed_group = 0

    def resize(self, *, max_batch: int, max_length: int, step: int, slots: int) -> None:
        self.max_batch, self.max_length, self.step = max_batch, max_length, step
        self.buffers = {}
        for state in self._states:
            self.buffers |= buffers_of(state, self._shape(state), self._device)
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
            for part in parts_of(state) if state.per_token and blocks else ():
                self.buffers[part][..., list(blocks), :, :] = 0

    def begin(self, tokens: Batch, *, rows: slice | PagedRows | None = None, decode: bool = False) -> None:
        if not isinstance(rows, PagedRows) or len(rows.numbers) != len(tokens.starts):
            raise InputError("a run over a cache in blocks says which rows it is about, and which blocks each has")
        super().begin(tokens, rows=slice(0, len(rows.numbers)))
        self._paged = rows
        self._row_numbers = torch.tensor(rows.numbers, device=self._device)
        self._tables, self._masks, self._places = {}, {}, None
        self._parts = tokens.parts(rows, worth=self._worth) if tokens.packed or tokens.shape[1] == 1 else []
        if len(self._parts) == 1 and not tokens.packed:
            self._parts = []

    def bind(
        self, op: Callable[..., Any], state: str, options: dict[str, Any], *, masked: bool = False
    ) -> Callable[..., Tensor]:
        attend = super().bind(op, state, options, masked=masked)
        if op is cached_attention:
            return self._in_parts(attend, _DIMS)
        return self._in_parts(attend, _LATENT_DIMS) if op is latent_attention else attend

    def _in_parts(self, attend: Callable[..., Tensor], dims: Sequence[int | None]) -> Callable[..., Tensor]:
        """An attention that takes the run's rows part by part.

        dims: along which each operand before the positions has the run's tokens; None: it has none of them.
        """

        def attend_in_parts(*given: Tensor | None, **named: Tensor | None) -> Tensor:
            if not self._parts:  # first, for a compiled step is traced through here
                return attend(*given, **named)
            operands, rest = given[: len(dims)], given[len(dims) + 1 :]
            mask, sinks = (named.get(name, value) for name, value in zip(_NAMED, (*rest, None, None), strict=False))
            packed = self._batch is not None and self._batch.packed
            if mask is not None and not packed:
                return attend(*given, **named)
            whole = Part(slice(0), self._batch, self._paged, self._tables, self._masks, self._places)  # type: ignore[arg-type]
            made = []
            for part in self._parts:
                self._look_at(part)
                mine = [
                    x if dim is None or x is None else part.take(x, dim, packed=packed)
                    for x, dim in zip(operands, dims, strict=True)
                ]
                own = sinks
                if sinks is not None and sinks.dim() == 4 and sinks.shape[2 if packed else 0] > 1:
                    own = part.take(sinks, 2, packed=packed)
                made.append(attend(*mine, part.batch.positions, None, own))
                part.places = self._places
            self._look_at(whole)
            return together(made, 2, packed=packed)

        if hasattr(attend, "rotates"):
            attend_in_parts.rotates = lambda *given: not self._parts and attend.rotates(*given)  # type: ignore[attr-defined]
        return attend_in_parts

    def _look_at(self, part: Part) -> None:
        self._batch, self._paged = part.batch, part.rows
        self._tables, self._masks, self._places = part.tables, part.masks, part.places

    def begin_parts(self, tokens: Batch, parts: list[Part]) -> None:
        """Before a run whose parts know their tables and places: nothing of it is asked of the host, or put there."""
        self._batch, self._active, self._fixed, self._is_fixed = tokens, None, None, False
        self._group, self._paged, self._parts = slice(0, len(tokens.counts)), PagedRows((), ()), parts
        self._tables, self._masks, self._found, self._places = {}, {}, {}, None

    def table(self, batch: int, *, group: int = 0) -> Tensor:
        """The blocks of rows that `fix` has named, [batch, blocks of the longest row]: the same memory each time."""
        return self._fixed_tables[batch, group]

    def fix(self, rows: PagedRows, batch: int, *, group: int = 0) -> None:
        """Before a run from fixed memory: what its first rows are about. The others of `batch` are about nothing.

        group: of several that take turns, each of which has its rows for many runs.
        """
        key = batch, group
        if key not in self._fixed_tables:
            width = -(-self.max_length // self.block_size)
            self._fixed_tables[key] = torch.full((batch, width), self.blocks, device=self._device)
            self._fixed_rows[key] = [()] * batch
        known = self._fixed_rows[key]
        # from one token to the next few rows begin a block
        changed = [
            at for at, (table, before) in enumerate(zip_longest(rows.tables, known, fillvalue=())) if table != before
        ]
        if not changed:
            return
        tables = [rows.tables[at] if at < len(rows.tables) else () for at in changed]
        longest = max(max(len(table), len(known[at])) for at, table in zip(changed, tables, strict=True))
        rest = (self.blocks,) * longest
        both = torch.tensor([(at, *(table + rest)[:longest]) for at, table in zip(changed, tables, strict=True)])
        if self._device.type == "cuda":
            both = both.pin_memory().to(self._device, non_blocking=True)
        self._fixed_tables[key][:, :longest].index_copy_(0, both[:, 0], both[:, 1:])
        for at, table in zip(changed, tables, strict=True):
            known[at] = table

    def begin_fixed(self, positions: Tensor, seen: int, *, rows: slice | None = None, group: int = 0) -> None:
        if rows is not None:
            raise InputError("the rows of a run from fixed memory are named before, by `fix`, not by a stretch")
        self._batch, self._active, self._fixed, self._group = None, None, seen, slice(0, len(positions))
        self._is_fixed, self._parts, self._fixed_group = True, [], group
        if (len(positions), group) not in self._fixed_tables:
            raise InputError("a run from fixed memory is about rows that were named before, by `fix`")
        self._tables, self._places = {}, None
        if self._kinds:  # here, so that a compiled step reads them as they are
            self._places = self._found_places(positions)
            self._table(seen)
            held = torch.arange(seen, device=self._device)
            dtype = next(state.dtype for state in self._states if state.per_token)
            for slots, window, chunk in self._kinds:
                self._fixed_masks[slots, window, chunk] = minus_infinity(positions, held, window, chunk, dtype)

    def _slots_of(self, keys: Tensor) -> int:
        return self.max_length

    def _table(self, count: int) -> Tensor:
        """The first blocks of each row, for `count` tokens: [B, count / block size]."""
        width = -(-count // self.block_size)
        if self._is_fixed:
            return self._fixed_tables[self._group.stop, self._fixed_group][:, :width]
        if width not in self._tables:
            rest = (self.blocks,) * width
            padded = [(table[:width] + rest)[:width] for table in self._paged.tables]
            self._tables[width] = torch.tensor(padded, device=self._device)
        return self._tables[width]

    def _put(self, buffer: Tensor, x: Tensor) -> None:
        """Keeps `x` [B, .., S, D] of the run's tokens."""
        if self._places is None:
            assert self._batch is not None
            self._places = self._found_places(self._batch.positions)
        buffer.flatten(-3, -2).index_copy_(-2, self._places, x.movedim(0, -3).flatten(-3, -2))

    def _found_places(self, positions: Tensor) -> Tensor:
        end = self.max_length if self._batch is None else self._batch.end
        blocks = self._table(end).gather(1, positions // self.block_size)
        return (blocks * self.block_size + positions % self.block_size).view(-1)

    def _get(self, buffer: Tensor, count: int) -> Tensor:
        """What the rows' first `count` positions hold, [B, .., count, D]."""
        width = -(-count // self.block_size)
        if not self._is_fixed and len(self._paged.tables) == 1 and len(self._paged.tables[0]) >= width:
            single = self._paged.tables[0]
            first = single[0]
            if single[:width] == tuple(range(first, first + width)):  # they lie one after the other: no copy
                start = first * self.block_size
                return buffer.flatten(-3, -2)[None, ..., start : start + count, :]
        table = self._table(count)
        found = buffer.index_select(-3, table.reshape(-1))
        *lead, _, size, width = found.shape
        return found.view(*lead, len(table), table.shape[1] * size, width).movedim(-3, 0)[..., :count, :]

    def _attend(
        self,
        state: str,
        options: dict[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        keys, values = f"{state}.key", f"{state}.value"
        k, v = self._keep(keys, k), self._keep(values, v)
        tokens = self._batch
        if tokens is not None and tokens.start == 0:
            few = q.shape[2] < _PREPARED_FROM and mask is None and sinks is None and options["causal"]
            if few and options["softcap"] is options["chunk"] is options["kv_map"] is None and can_flash(q, v):
                return flash_attention(q, k, v, scale=options["scale"], window=options["window"])  # type: ignore[no-any-return]
            return attention(q, k, v, mask, sinks, **options)
        seen, hidden = self._sight(self.max_length, options["window"], options["chunk"], q.dtype)
        found = self._held(keys, seen), self._held(values, seen)
        plain = mask is None and sinks is None and options["causal"]
        plain = plain and all(options[name] is None for name in ("softcap", "chunk", "kv_map"))
        if plain and tokens is not None and tokens.behind is not None and can_flash(q, v):
            return flash_behind(q, *found, tokens.behind, scale=options["scale"], window=options["window"])
        if plain and tokens is not None and self._can_flash(q, v, self.max_length, options["window"]):
            scale, window = options["scale"], options["window"]
            return flash_rows(q, *found, tokens.starts, tokens.counts, scale=scale, window=window)
        if hidden is not None:
            mask = hidden if mask is None else mask.to(q.dtype) + hidden
        given = {name: options[name] for name in ("scale", "softcap", "kv_map")}
        # as in a cache of rows, a step of one token pays for the products and not for the kernel's walk
        written_out = self._fixed is not None and q.device.type == "cuda"
        return attention(q, *found, mask, sinks, **given, written_out=written_out)

    def _of_run(self, buffer: Tensor) -> Tensor:
        return buffer  # whose blocks the table names

    def _table_of_run(self) -> Tensor:
        return self._table(self.max_length if self._batch is None else self._batch.end)

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
