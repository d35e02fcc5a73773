"""The cache of one rank: keys and values of the tokens so far, in memory set aside once.

    state      what the compiler says of a layer's keys or values: heads and dims of this rank, how far back is seen
    slots      positions that are kept: all up to max_length, or what a window (or chunk) and one call's tokens need
    buffer     [max_batch, heads, slots, dim]; position p lies in slot p % slots

bytes = max_batch * sum over states of heads * slots * dim * itemsize

What is appended by an op of its own (`cache_append`) is handed out as it lies, one slot per position. A state per
sequence has no slots: [batch, ...], replaced by each token that a row takes, zero before the first.

A run may use some of the rows only (`begin(.., rows=slice(8, 16))`): groups of sequences that are run in turn share one
cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.kv_cache.batch import Batch, PagedRows
from runtime.kv_cache.buffers import buffers_of, kept_as, parts_of, read_from, shape_of
from runtime.kv_cache.fixed_states import FixedStates, write_active
from runtime.kv_cache.slots import Slots, hidden_slots, minus_infinity, slots_of
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention
from runtime.ops.kernels.decode.latent_decode import can_decode_latent
from runtime.ops.kernels.decode_attention import (
    Attending,
    can_decode,
    one_or_several,
    one_token,
    one_token_of_latents,
    registered,
)
from runtime.ops.kernels.flash_attention import can_flash, flash_rows
from runtime.ops.state import cache_append, state_read, state_write
from runtime.ops.state.latent_attention import Seen, latent_attention, over_cache
from runtime.program.shards import StateShard

__all__ = ["Cache"]


class Cache:
    """Buffers for `max_batch` sequences of up to `max_length` tokens, at most `step` of which come in one call.

    slots: how many there are at least where all positions are kept, which may be more than there are positions.
    """

    takes_turns = True  # whether runs over it may
    _OF_RUN: tuple[str, ...] = ("_batch", "_fixed", "_group", "_is_fixed", "_active", "_masks", "_found")

    def __init__(
        self,
        states: Sequence[StateShard],
        *,
        max_batch: int,
        max_length: int,
        step: int,
        device: torch.device,
        slots: int = 0,
    ) -> None:
        self._states, self._device = tuple(states), device
        self._state_of = {state.name: state for state in self._states}
        self._appended: set[str] = set()
        self.fixed_states = FixedStates({})  # where states per sequence are in runs of fixed shape
        self.resize(max_batch=max_batch, max_length=max_length, step=step, slots=slots)
        self._batch: Batch | None = None  # the run's tokens; None where only the device knows their positions
        self._group = slice(0, 0)  # the rows of the run
        self._active: Tensor | None = None  # the numbers of the active rows, where not all are
        self._masks: dict[Any, Tensor | None] = {}
        self._fixed_masks: dict[tuple[int, int | None, int | None], Tensor] = {}
        self._found: dict[int, tuple[Tensor, Tensor]] = {}  # by number of slots: where the tokens of the run lie
        self._kinds: set[tuple[int, int | None, int | None]] = set()  # slots, window, chunk of the attentions bound
        self._fixed: int | None = None  # slots that runs of single tokens look at, where only the device knows more
        self._is_fixed = False  # whether this is such a run: a compiled step asks it, and no number
        self._attending: list[Attending] = []

    def resize(self, *, max_batch: int, max_length: int, step: int, slots: int) -> None:
        """Other buffers, all zero, in the place of those that there are; give those back before, by `drop`."""
        self.max_batch, self.max_length, self.step = max_batch, max_length, step
        self.buffers: dict[str, Tensor] = {}
        for state in self._states:
            count = slots_of(state, max_length=max(max_length, slots), step=step)
            self.buffers |= buffers_of(state, shape_of(state, max_batch, count), self._device)
        self._remembered = {s.name: self.buffers[s.name].shape for s in self._states if not s.per_token}
        self.fixed_states = FixedStates(self._remembered)
        self._used = 0  # how many slots runs may have written to since all were zero
        self._replayed = 0  # how many captured runs may write to whenever they are replayed, of which nobody tells
        self._rows = torch.arange(max_batch, device=self._device)[:, None]

    def piece_size(self, size: int, longest: int) -> int:
        """How many tokens of prompts of up to `longest` are run at a time, `size` at most."""
        return min(size, self.step)

    def drop(self) -> None:
        """Gives the buffers back; nothing runs until `resize`."""
        self.buffers.clear()
        self.fixed_states = FixedStates({})

    @property
    def any_length(self) -> bool:
        """Whether steps of one token, as they are bound, are the same whatever the number of slots."""
        grows = any(state.per_token for state in self._states)
        return (bool(self._attending) or not grows) and not self._kinds and not self._appended

    @property
    def any_rows(self) -> bool:
        """Whether steps of one token, as they are bound, are the same whichever rows of the cache they are about."""
        return not self._kinds and not self._appended and not self._remembered

    @property
    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def begin(self, tokens: Batch, *, rows: slice | PagedRows | None = None, decode: bool = False) -> None:
        """Before each run: what the run's tokens are. rows: those of the cache that they belong to; the first ones.

        decode: by the program for single tokens, which may share out tokens between ranks otherwise.
        """
        batch, size = tokens.shape
        if isinstance(rows, PagedRows):
            raise InputError("the rows of this cache are stretches of their own: it has no blocks to name")
        rows = slice(0, batch) if rows is None else rows
        if rows.stop - rows.start != batch:
            raise InputError(f"a run of {batch} sequences cannot use the rows {rows.start} to {rows.stop} of a cache")
        if rows.stop > self.max_batch or tokens.end > self.max_length or size > self.step:
            raise InputError(
                f"the cache holds {self.max_batch} sequences of {self.max_length} tokens, {self.step} of them in one "
                f"run; got {batch} sequences up to position {tokens.end - 1}, {size} tokens in this run"
            )
        self._batch, self._fixed, self._group, self._is_fixed = tokens, None, rows, False
        self._used = max(self._used, tokens.end)
        numbers = [] if all(tokens.active) else [row for row, active in enumerate(tokens.active) if active]
        self._active = None if all(tokens.active) else torch.tensor(numbers, device=tokens.positions.device)
        self._masks, self._found = {}, {}

    def under_way(self) -> dict[str, Any]:
        """What is known of the run that began last; runs that take turns begin, all of them, and are then resumed."""
        return {name: getattr(self, name) for name in self._OF_RUN}

    def resume(self, run: dict[str, Any]) -> None:
        self.__dict__.update(run)

    def begin_fixed(self, positions: Tensor, seen: int, *, rows: slice | None = None, group: int = 0) -> None:
        """Before a run of one token per row at `positions` [B, 1], of which the host only knows that all are < `seen`.

        rows: as for `begin`. group: as `PagedCache.fix` has it. All that such a run does with the cache are the same
        ops on the same memory: it can be captured once and replayed, where `fixed_states` have been settled.
        """
        self._batch, self._active, self._fixed = None, None, seen
        self._group = slice(0, len(positions)) if rows is None else rows
        self._is_fixed = True
        self._replayed = max(self._replayed, seen)
        self._found = {slots: Slots(slots).find(self._rows[self._group], positions) for slots, _, _ in self._kinds}
        for slots, window, chunk in self._kinds:
            held = Slots(slots).held(positions, min(slots, seen), wraps=slots < self.max_length)
            dtype = next(state.dtype for state in self._states if state.per_token)
            self._fixed_masks[slots, window, chunk] = minus_infinity(positions, held, window, chunk, dtype)

    def start(self, rows: slice | None = None) -> None:
        """Before the first run of new sequences in `rows`, or in all of them: nothing is remembered."""
        for name, shape in self._remembered.items():
            if rows is None:
                self.buffers[name] = self.buffers[name].new_zeros(shape)  # the last one may have had fewer rows
            else:
                self.buffers[name][rows] = 0
        for name in self._appended:
            # hidden slots are multiplied by 0, which not every number survives
            group = slice(None) if rows is None else rows
            self.buffers[name][group][..., : max(self._used, self._replayed), :] = 0
        if rows is None:
            self._used = 0

    def bind(
        self, op: Callable[..., Any], state: str, options: dict[str, Any], *, masked: bool = False
    ) -> Callable[..., Tensor]:
        """The function that takes the place of an op that uses `state`: it takes the op's tensors.

        masked: one of an attention's is a mask.
        """
        by_op: dict[Any, Callable[..., Tensor]] = {
            cache_append: self._append,
            state_read: self._read,
            state_write: self._write,
        }
        if op in by_op:
            if op is cache_append:
                self._appended.add(state)

            def with_state(*tensors: Tensor) -> Tensor:
                return by_op[op](state, *tensors)

            return with_state
        if op is latent_attention:
            return self._bind_latent(state, options, masked=masked)
        keys, values = self.buffers[f"{state}.key"], self.buffers[f"{state}.value"]
        defaults = cached_attention.__kwdefaults__
        assert defaults is not None
        options = {**defaults, **options}
        by_kernel = None
        dtype = self._state_of[f"{state}.key"].dtype
        if not masked and options["kv_map"] is None and options["causal"] and can_decode(keys, values, dtype):
            attending = Attending(functools.partial(one_token, *self._for_kernel, state, options), values.shape[-1])
            self._attending.append(attending)
            by_kernel = registered(attending)
        else:
            self._kinds.add((self._slots_of(keys), options["window"], options["chunk"]))
        several = functools.partial(self._attend, state, options)
        return one_or_several(by_kernel, several, lambda: self._all_move)

    def _slots_of(self, keys: Tensor) -> int:
        """How many slots a row has in a buffer."""
        return keys.shape[2]

    @property
    def _for_kernel(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return self._codes_and_scales, self._table_of_run

    def _codes_and_scales(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The run's rows of a state as they are held; None: as numbers."""
        held = [self._of_run(self.buffers[part]) for part in parts_of(self._state_of[name])]
        return held[0], held[1] if len(held) > 1 else None

    def _of_run(self, buffer: Tensor) -> Tensor:
        """What a kernel reads, of which it knows the row by its number in the run."""
        return buffer[self._group]

    def _table_of_run(self) -> Tensor | None:
        """Where its blocks are, if rows lie in such."""
        return None

    def _attend(
        self, state: str, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """`cached_attention` over one state, `options` being its keywords but for the state's name."""
        keys, values = f"{state}.key", f"{state}.value"
        slots = self._slots_of(self.buffers[keys])
        k, v = self._keep(keys, k), self._keep(values, v)
        plain = mask is None and sinks is None and options["causal"]
        plain = plain and all(options[name] is None for name in ("softcap", "chunk", "kv_map"))
        if plain and self._can_flash(q, v, slots, options["window"]):
            tokens = self._batch
            assert tokens is not None
            rows = self._held(keys, slots), self._held(values, slots)
            scale, window = options["scale"], options["window"]
            return flash_rows(q, *rows, tokens.starts, tokens.counts, scale=scale, window=window)
        if self._batch is not None and self._batch.start == 0:
            # nothing came before: the tokens of this call are all there is to see
            return attention(q, k, v, mask, sinks, **options)
        seen, hidden = self._sight(slots, options["window"], options["chunk"], q.dtype)
        if hidden is not None:
            mask = hidden if mask is None else mask.to(q.dtype) + hidden
        # with a mask, torch's kernels walk through all slots of a head by themselves: 2 times slower on an H200 than
        # the products for 256 slots, 6 times for 8,192; what they cost the host, a captured step does not pay
        written_out = self._fixed is not None and q.device.type == "cuda"
        return attention(
            q, self._held(keys, seen), self._held(values, seen), mask, sinks,
            scale=options["scale"], softcap=options["softcap"], kv_map=options["kv_map"], written_out=written_out,
        )  # fmt: skip

    @property
    def _all_move(self) -> bool:
        """Whether a kernel may add a token to each row of the run: one that is not active repeats what it has."""
        return self._is_fixed or self._active is None

    def _bind_latent(self, state: str, options: dict[str, Any], *, masked: bool) -> Callable[..., Tensor]:
        defaults = latent_attention.__kwdefaults__
        assert defaults is not None
        options = {**defaults, **options}
        window, chunk = options["window"], options["chunk"]
        name = f"{state}.latent"
        by_kernel = None
        if not masked and options["causal"] and can_decode_latent(self.buffers[name], self._state_of[name].dtype):
            attending = Attending(functools.partial(one_token_of_latents, *self._for_kernel, name, options))
            self._attending.append(attending)
            by_kernel = registered(attending)
        else:
            self._kinds.add((self._slots_of(self.buffers[name]), window, chunk))

        def keep(rows: Tensor) -> Seen:
            kept = self._keep(name, rows[:, None])
            if self._batch is not None and self._batch.start == 0:
                return Seen(kept[:, 0], None, is_first=True)
            seen, hidden = self._sight(self._slots_of(self.buffers[name]), window, chunk, rows.dtype)
            return Seen(self._held(name, seen)[:, 0], hidden, captured=self._fixed is not None)

        return over_cache(keep, options, by_kernel, lambda: self._all_move)

    def _keep(self, name: str, x: Tensor) -> Tensor:
        """Adds keys or values of the run's tokens to a state; as they will be read."""
        parts, kept = kept_as(self._state_of[name], x)
        for part, rows in zip(parts_of(self._state_of[name]), parts, strict=True):
            self._put(self.buffers[part], rows)
        return kept

    def _held(self, name: str, count: int) -> Tensor:
        """Keys or values in the first `count` slots of the run's rows."""
        return read_from(self._state_of[name], lambda part: self._get(self.buffers[part], count))

    def _put(self, buffer: Tensor, x: Tensor) -> None:
        """Keeps `x` [B, G, S, D] of the run's tokens."""
        start = self._start(buffer.shape[2])
        if start is not None:
            buffer[self._group, :, start : start + x.shape[2]] = x
        else:
            blocks, at = self._find(buffer.shape[2])
            buffer[blocks, :, at] = self._active_rows(x).transpose(1, 2)

    def _get(self, buffer: Tensor, count: int) -> Tensor:
        """The first `count` slots of the run's rows, [B, G, count, D]."""
        return buffer[self._group, :, :count]

    def _can_flash(self, q: Tensor, v: Tensor, slots: int, window: int | None) -> bool:
        """Whether several tokens stand behind others that lie in their order, or rows are of different lengths."""
        tokens = self._batch
        if tokens is None or q.shape[2] == 1 or slots < tokens.end or tokens.behind is not None:
            return False
        is_first = tokens.start == 0 and (window is None or window >= tokens.end)
        return not is_first and can_flash(q, v)

    def _start(self, slots: int) -> int | None:
        """The slot at which every row's tokens start, if they lie one after the other and the host knows where."""
        tokens = self._batch
        return None if tokens is None or slots < tokens.end else tokens.start

    def _sight(
        self, slots: int, window: int | None, chunk: int | None, dtype: torch.dtype
    ) -> tuple[int, Tensor | None]:
        """How many slots are looked at, and what is added to the scores to hide some of them."""
        if self._fixed is not None:
            return min(slots, self._fixed), self._fixed_masks[slots, window, chunk]
        assert self._batch is not None
        seen = min(slots, self._batch.end)
        return seen, self._hidden(seen, slots, window, chunk, dtype)

    def _append(self, state: str, x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        tokens, buffer = self._batch, self.buffers[state]
        assert tokens is not None
        if tokens.start is not None:
            buffer[self._group][..., tokens.start : tokens.end, :] = x
        else:
            # rows and positions first: [B, S, .., D]
            buffer.movedim(-2, 1)[self._find(buffer.shape[-2])] = self._active_rows(x).movedim(-2, 1)
        return buffer[self._group][..., : len(slots), :]

    def _read(self, state: str, batch: Tensor) -> Tensor:
        held = self.buffers[state]
        if self._is_fixed:
            return held[self._group].clone()  # written in place
        # a group's part is written in place, and who has read it may still use it
        return held[self._group] if self._replaces(state) else held[self._group].clone()

    def _replaces(self, state: str) -> bool:
        """Whether a write puts a new tensor in the place of the old one: where the run has all rows from the first."""
        return self._group.start == 0 and self._group.stop >= len(self.buffers[state])

    def _write(self, state: str, value: Tensor, active: Tensor) -> Tensor:
        """Replaces what is remembered: who has read the old state may still use it."""
        if self._is_fixed:
            write_active(self.buffers[state][self._group], value, active)
            return value
        tokens = self._batch
        assert tokens is not None
        if not all(tokens.active):
            active = active.view(-1, *([1] * (value.dim() - 1)))
            value = torch.where(active, value, self.buffers[state][self._group])
        if self._replaces(state):
            self.buffers[state] = value
        else:
            self.buffers[state][self._group] = value
        return value

    def _find(self, slots: int) -> tuple[Tensor, Tensor]:
        """Where this call's tokens lie, the same for all layers with as many slots."""
        if slots not in self._found:
            assert self._batch is not None
            rows, positions = self._rows[self._group], self._batch.positions
            self._found[slots] = Slots(slots).find(self._active_rows(rows), self._active_rows(positions))
        return self._found[slots]

    def _active_rows(self, x: Tensor) -> Tensor:
        """Without the rows that repeat a token: what else is remembered has moved on, so that its keys would differ."""
        return x if self._active is None else x[self._active]

    def _hidden(
        self, seen: int, slots: int, window: int | None, chunk: int | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Minus infinity where a query must not look, [B, 1, S, seen]; None where it may look everywhere."""
        key = (seen, slots, window, chunk, dtype)
        if key not in self._masks:
            assert self._batch is not None
            self._masks[key] = hidden_slots(self._batch, seen, slots, window, chunk, dtype)
        return self._masks[key]
