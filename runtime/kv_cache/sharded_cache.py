"""The cache of one rank where ranks share out the tokens of each sequence: it keeps 1/n of them.

    state    [max_batch, heads, slots + 1, dim], with about L / n slots     see `sharded_slots`

    ring, gather, ulysses   a run that deals its tokens out: each rank keeps its own, and keys and values of all ranks,
                            those of earlier runs too, meet the queries as they do without a cache
    merge                   a run that every rank has all of: each attends to what it keeps, one all-gather brings the
                            parts together, and every rank merges them in the same order: all have the same bits

What is seen of a slot is said by the position that it holds, on every rank alike. Filling is no token: it is kept
nowhere and seen by none. Prompts by a ring and steps by a merge: Yang et al., arXiv:2411.01783, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.kv_cache.batch import Batch, PagedRows
from runtime.kv_cache.buffers import StateRows, buffers_of
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.sharded_attention import ShardedAttention, ShardedLatent
from runtime.kv_cache.sharded_slots import DealtOut, KeptTokens, ShardedRun, sharded_slots
from runtime.ops.rows.sequence_attention import cached_sequence_attention, require_parts
from runtime.ops.rows.token_order import TokenOrder
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention
from runtime.program.rank_program import RankProgram
from runtime.program.shards import StateShard

__all__ = ["ShardedCache", "cache_for"]


def cache_for(
    program: RankProgram, *, max_batch: int, max_length: int, step: int, device: torch.device, slots: int = 0
) -> Cache:
    """The cache that the rank's states ask for."""
    axes = {state.token_axes for state in program.states}
    if not any(axes):
        return Cache(program.states, max_batch=max_batch, max_length=max_length, step=step, device=device, slots=slots)
    shared = max(axes)
    if others := [state.name for state in program.states if state.token_axes != shared or not state.per_token]:
        raise InputError(
            f"rank {program.rank}: the tokens of some states are shared out over {shared}, those of others are not: "
            f"{', '.join(others[:6])}"
        )
    ranks = program.mesh.group(shared, program.rank)
    return ShardedCache(
        program.states, max_batch=max_batch, max_length=max_length, step=step, device=device,
        parts=len(ranks), coordinate=ranks.index(program.rank),
    )  # fmt: skip


class ShardedCache(Cache):
    """See the module's docstring; this is rank `coordinate` of `parts`."""

    takes_turns = False

    def __init__(
        self,
        states: Sequence[StateShard],
        *,
        max_batch: int,
        max_length: int,
        step: int,
        device: torch.device,
        parts: int,
        coordinate: int,
    ) -> None:
        self.parts, self.coordinate = parts, coordinate
        self._order: str | None = None
        """In which runs are dealt out, once an op has said so."""
        self._run: ShardedRun | None = None
        super().__init__(states, max_batch=max_batch, max_length=max_length, step=step, device=device)

    def resize(self, *, max_batch: int, max_length: int, step: int, slots: int) -> None:
        self.max_batch, self.max_length, self.step = max_batch, max_length, step
        counts = {
            state.name: sharded_slots(state, max_length=max_length, step=step, parts=self.parts)
            for state in self._states
        }
        self._most = max((counts[state.name] for state in self._states if state.sees is None), default=None)
        """How many tokens of a row there is room for on a rank; None: any number, as old ones are given up."""
        self.buffers: dict[str, Tensor] = {}
        for state in self._states:
            shape = (max_batch, *state.shape[:-1], counts[state.name] + 1, state.shape[-1])
            self.buffers |= buffers_of(state, shape, self._device)
        numbers = sorted(set(counts.values()))
        self.kept = KeptTokens(numbers, max_batch=max_batch, parts=self.parts, device=self._device)
        self._used = self._replayed = 0

    def piece_size(self, size: int, longest: int) -> int:
        """As many for each rank, where there are several pieces."""
        size = min(size, self.step)
        return size if size >= longest or size < self.parts else size - size % self.parts

    def start(self, rows: slice | None = None) -> None:
        self.kept.forget(slice(0, self.max_batch) if rows is None else rows)

    def take_over(self, row: int, source: int, length: int) -> None:
        """`row` begins with the first `length` tokens of the row `source`, which may be itself and keeps its own."""
        count = self.kept.take_over(row, source, length)[self.coordinate]
        for buffer in self.buffers.values() if row != source else ():
            buffer[row, :, :count] = buffer[source, :, :count]

    def begin(self, tokens: Batch, *, rows: slice | PagedRows | None = None, decode: bool = False) -> None:
        """decode: every rank has all of the run's tokens; otherwise they are dealt out."""
        super().begin(tokens, rows=rows)
        group = self._group
        if decode:
            appended = self.kept.append(tokens.positions, group, self.coordinate, tokens.active)
            ends = [start + count for start, count in zip(tokens.starts, tokens.counts, strict=True)]
            self._run = ShardedRun(
                group, tokens.positions, appended.slots, self.kept.most(group, ends), self.kept, appended=appended
            )
        else:
            self._run = self._deal_out(tokens, group)
        if self._most is not None and self._run.seen > self._most:
            raise InputError(
                f"a rank has {self._most} slots for each sequence and needs {self._run.seen}: pieces of prompts should "
                f"be multiples of the {self.parts} ranks that share out their tokens; give another prefill_step"
            )

    def _deal_out(self, tokens: Batch, group: slice) -> ShardedRun:
        kept, numbers = self.kept, range(group.start, group.stop)
        for row, start, is_active in zip(numbers, tokens.starts, tokens.active or [True] * len(numbers), strict=True):
            if is_active and start == 0 and kept.ends[row]:  # another text, without `start`
                kept.forget(slice(row, row + 1))
        has_past, before = any(tokens.starts), None
        # behind rows that are not to change, nothing is written as one stretch
        if tokens.start is not None and all(tokens.active):
            each = [{kept.count(rank, row, tokens.start) for row in numbers} for rank in range(self.parts)]
            before = tuple(one.pop() for one in each) if all(len(one) == 1 for one in each) else None
        order = TokenOrder.of(tokens.positions.shape[1], self.parts, self._order or "zigzag")
        tokens_of = tuple(order.held(rank, self._device) for rank in range(self.parts))
        own = tokens_of[self.coordinate]
        slots = {count: each[:, own] for count, each in kept.deal_out(tokens, group, order).items()}
        dealt_out = DealtOut(order, tokens_of, has_past, tokens.start or 0, before)
        seen = kept.most(group, [0] * len(numbers))
        return ShardedRun(group, tokens.positions, slots, seen, kept, dealt_out=dealt_out)

    @property
    def any_rows(self) -> bool:
        return False

    def begin_fixed(self, positions: Tensor, seen: int, *, rows: slice | None = None, group: int = 0) -> None:
        self._batch, self._active, self._fixed = None, None, seen
        self._group = slice(0, len(positions)) if rows is None else rows
        self._is_fixed = True
        appended = self.kept.append(positions, self._group, self.coordinate)
        most = max(sharded_slots(state, max_length=seen, step=self.step, parts=self.parts) for state in self._states)
        self._run = ShardedRun(self._group, positions, appended.slots, most, self.kept, appended=appended)
        for count, window, chunk in self._kinds:  # here, so that a compiled step reads them as they are
            self._run.hidden(self.coordinate, count, window, chunk, self._states[0].dtype)

    def bind(
        self, op: Callable[..., Any], state: str, options: dict[str, Any], *, masked: bool = False
    ) -> Callable[..., Tensor]:
        raise InputError(
            f"{op.__name__} of {state!r} keeps what it is given on one rank; the tokens of this cache are shared out "
            f"over {self.parts} ranks, for cached_sequence_attention"
        )

    def bind_over_ranks(
        self, channel: Any, options: dict[str, Any], *, op: Callable[..., Any] = cached_sequence_attention
    ) -> Callable[..., Tensor]:
        """The function that takes the place of an attention over ranks: it takes the op's tensors."""
        defaults: dict[str, Any] | None = op.__kwdefaults__
        assert defaults is not None
        options = {**defaults, **options}
        require_parts(channel, options.pop("parts"))
        state = options.pop("state")
        if not options.pop("causal"):
            raise InputError(f"node {channel.node!r} is not causal: it would see tokens that are not there yet")
        found: ShardedAttention | ShardedLatent
        if op is latent_sequence_attention:
            latent = self._rows_of(f"{state}.latent")
            found, slots, has_kernel = ShardedLatent(latent, self._current, channel, **options), latent.slots, False
        else:
            keys, values = (self._rows_of(f"{state}.{part}") for part in ("key", "value"))
            found = ShardedAttention(keys, values, self._current, channel, **options)
            slots, has_kernel = keys.slots, found.has_kernel
        if options["how"] == "merge":
            if not has_kernel:
                self._kinds.add((slots, options["window"], options["chunk"]))
        else:
            if self._order not in (None, options["order"]):
                raise InputError(
                    f"node {channel.node!r} deals tokens out in the order {options['order']!r}, others {self._order!r}"
                )
            self._order = options["order"]
        if not isinstance(found, ShardedAttention) or not has_kernel:
            return found.__call__
        by_kernel = found

        def attend(*given: Any, **named: Any) -> Tensor:
            return by_kernel(*given, **named)

        attend.rotates = by_kernel.rotates  # type: ignore[attr-defined]
        return attend

    def _rows_of(self, name: str) -> StateRows:
        return StateRows(self._state_of[name], lambda: self.buffers)

    def _current(self) -> ShardedRun:
        assert self._run is not None
        return self._run
