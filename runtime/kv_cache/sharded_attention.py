"""Attention over a cache whose tokens ranks share out, bound to one state.

    exchange   queries of the rank's own tokens; keys and values of all ranks come to them, from all runs so far
    merge      queries of all tokens; each rank attends to what it keeps, and the parts come together

What is exchanged behind other runs is the used part of each rank's cache, the run's own tokens included. It is as long
as the fullest rank's. Where that is more than the queries and what comes of them, these are sent instead, but by a
gather: n - 1 permutes, and an all-to-all of the parts (Yang et al., arXiv:2411.01783, section 3.4, "pass-Q"). Behind
other runs, ring-ulysses is a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.kv_cache.buffers import StateRows
from runtime.kv_cache.sharded_slots import DealtOut, ShardedRun, moved
from runtime.ops.kernels.decode.shared_decode import merged_rows
from runtime.ops.kernels.decode_attention import (
    Attending,
    Rotation,
    can_decode,
    can_rotate,
    decode_attention,
    registered,
)
from runtime.ops.kernels.flash_attention import can_flash, flash_attention
from runtime.ops.rows.attend_runs import Block, RankQueries
from runtime.ops.rows.exchange_keys import around, filled_up
from runtime.ops.rows.partial_attention import accumulating, merge_parts, partial_attention, with_sinks
from runtime.ops.rows.sequence_attention import attend_over_ranks
from runtime.ops.rows.ulysses import by_heads, heads_of, kv_of
from runtime.ops.rows.visible import Visible
from runtime.ops.state.latent_attention import of_heads
from runtime.ops.state.latent_heads import OfLatent

__all__ = ["ShardedAttention"]


class ShardedAttention:
    """One `cached_sequence_attention`. keys, values: of its state, of sizes D and Dv."""

    def __init__(
        self,
        keys: StateRows,
        values: StateRows,
        run: Callable[[], ShardedRun],
        channel: Any,
        *,
        how: str,
        neighbours: int,
        order: str,
        scale: float,
        window: int | None,
        chunk: int | None,
        softcap: float | None,
        kv_map: list[int] | None,
    ) -> None:
        self._keys, self._values, self._run, self._channel = keys, values, run, channel
        self._how, self._neighbours, self._order = how, neighbours, order
        self._scale, self._softcap = scale, softcap
        self._window, self._chunk = window, chunk
        self._kv_map = None if kv_map is None else list(kv_map)
        self.has_kernel = (
            how == "merge"
            and window is None
            and chunk is None
            and kv_map is None
            and not keys.state.float8
            and can_decode(keys.numbers, values.numbers, keys.numbers.dtype)
        )
        """Whether one token of each row is kept and attended to by the kernel of `decode_attention`."""
        packed = Attending(self._packed_by_kernel, values.width + 1, dtype=torch.float32)
        self._by_kernel = registered(packed)

    def rotates(self, q: Tensor, *by: Any) -> bool:
        """Whether it takes a `rotation` of one token's queries and keys that is still to be done."""
        return self.has_kernel and can_rotate(q, *by)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        rotation: Rotation | None = None,
        ahead: bool = False,
    ) -> Tensor:
        """ahead: of no use, for which tokens are its own is told by the step."""
        run = require_kind(self._run(), self._how, self._channel)
        if self.has_kernel and q.shape[2] == 1 and mask is None:
            packed = self._by_kernel(q, k, v, positions, None, rotation)
            if not torch.compiler.is_compiling():  # which fuses it itself
                found: Tensor | None = self._channel.merge_parts(packed, sinks, q.dtype)
                if found is not None:
                    return found
                if sinks is None:
                    return merged_rows(self._channel.all_gather(packed[None], dim=0), q.dtype)
            return self._merged(packed, sinks).to(q.dtype)
        if rotation is not None:  # behind a mask
            cos, sin, half = rotation
            q, k = (x * cos + torch.roll(x, -half, -1) * sin for x in (q, k))
        k, v = (keep(run, each, x, self._channel) for each, x in ((self._keys, k), (self._values, v)))
        dealt_out = run.dealt_out
        if dealt_out is None:
            return self._merge(run, q, mask, sinks)
        if not dealt_out.has_past:
            return attend_over_ranks(
                self._channel, q, k, v, dealt_out.order.total, mask, sinks,
                how=self._how, neighbours=self._neighbours, parts=dealt_out.order.parts,
                 order=self._order, causal=True, scale=self._scale,
                window=self._window, chunk=self._chunk, softcap=self._softcap, kv_map=self._kv_map,
            )  # fmt: skip
        alike = mask is None or mask.dim() < 2 or mask.shape[-2] == 1
        if self._how != "gather" and alike and self._queries_are_less(run, dealt_out, q):
            return self._exchange_queries(run, dealt_out, q, mask, sinks)
        if self._how == "ulysses":
            return self._exchange_heads(run, dealt_out, q, mask, sinks)
        return self._exchange_keys(run, dealt_out, q, mask, sinks)

    def _merge(self, run: ShardedRun, q: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        dtype = self._keys.state.dtype
        hidden = run.hidden(self._channel.coordinate, self._keys.slots, self._window, self._chunk, dtype)
        block = self._used(run)
        out, lse = partial_attention(
            q, block.keys, block.values, scale=self._scale, softcap=self._softcap,
            mask=hidden if mask is None else mask.to(q.dtype) + hidden,
        )  # fmt: skip
        return self._merged(torch.cat([out.to(accumulating(q.dtype)), lse[..., None]], -1), sinks).to(q.dtype)

    def _merged(self, packed: Tensor, sinks: Tensor | None) -> Tensor:
        """What the parts [B, H, S, Dv + 1] of all ranks are together: on every rank the same bits."""
        return merged_over(self._channel, packed, sinks)

    def _packed_by_kernel(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        sinks: Tensor | None,
        rotation: Rotation | None = None,
        ahead: bool = False,
    ) -> Tensor:
        """The part of this rank. To the kernel a row is as long as what this rank keeps of it."""
        run = self._run()
        keys, values = (each.numbers[run.rows] for each in (self._keys, self._values))
        assert run.appended is not None
        found: Tensor = decode_attention(
            q, k, v, run.appended.before, keys, values, scale=self._scale, softcap=self._softcap, rotation=rotation,
            is_own=run.appended.is_own,
        )  # fmt: skip
        return found

    def _used(self, run: ShardedRun) -> Block:
        """What this rank keeps of the run's rows, as far as anyone looks; by query head where these share none."""
        seen = min(run.seen, self._keys.slots)
        return Block(self._keys.read(run.rows, seen), self._values.read(run.rows, seen), ()).mapped(self._kv_map)

    def _exchange_keys(
        self, run: ShardedRun, dealt_out: DealtOut, q: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        seen, width, own = min(run.seen, self._keys.slots), self._keys.packed_width, self._channel.coordinate
        queries = self._queries_of(dealt_out, own, q, self._values.width, mask)
        message = torch.cat([each.packed(run.rows, seen) for each in (self._keys, self._values)], -1)
        for source, rows in brought(self._channel, message, self._how):
            keys, values = self._keys.unpacked(rows[..., :width]), self._values.unpacked(rows[..., width:])
            self._add(queries, run, dealt_out, own, source, Block(keys, values, ()))
        return queries.result(sinks)

    def _exchange_queries(
        self, run: ShardedRun, dealt_out: DealtOut, q: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """The queries of each rank come to what this one keeps, and what they have seen goes back."""
        order, own, (batch, heads, size, _), width = (
            dealt_out.order,
            self._channel.coordinate,
            q.shape,
            self._values.width,
        )
        seen = min(run.seen, self._keys.slots)
        kept = Block(self._keys.read(run.rows, seen), self._values.read(run.rows, seen), ())
        found: list[Tensor] = [q] * order.parts
        for target, rows in around(self._channel, filled_up(q, max(order.counts))):
            queries = self._queries_of(dealt_out, target, rows[:, :, : order.counts[target]], width, mask)
            self._add(queries, run, dealt_out, target, own, kept)
            found[target] = torch.cat([queries.seen.out, queries.seen.lse[..., None]], -1).reshape(-1)
        send_counts = [each.numel() for each in found]
        back = [batch * heads * size * (width + 1)] * order.parts
        parts = self._channel.all_to_all(torch.cat(found), send_counts, back)
        parts = parts.view(order.parts, batch, heads, size, width + 1)
        return with_sinks(*merge_parts(parts[..., :-1], parts[..., -1]), sinks).to(q.dtype)

    def _queries_are_less(self, run: ShardedRun, dealt_out: DealtOut, q: Tensor) -> bool:
        """Whether fewer bytes travel if the queries do: behind a long past, for a short run; the same on all ranks.

        Of what one rank sends to another: keys and values of all kv heads, or of those that the other's heads read,
        with the queries of these and their results.
        """
        most, (_, heads, _, size), value = max(dealt_out.order.counts), q.shape, self._values.width
        kv_heads, sent = self._keys.state.shape[0], 0
        of_row = self._keys.row_bytes + self._values.row_bytes
        if self._how == "ulysses":
            of_row = (size + value) * self._keys.state.dtype.itemsize
            shares = heads_of(dealt_out.order.parts, heads, kv_of(q, self._keys.numbers, self._kv_map))
            kv_heads = max(len(share.kv) for share in shares)
            sent = most * max(share.count for share in shares) * (size + value) * q.itemsize
        kept = min(run.seen, self._keys.slots) * kv_heads * of_row
        parts = (value + 1) * accumulating(q.dtype).itemsize
        return most * heads * (size * q.itemsize + parts) < kept + sent

    def _queries_of(self, dealt_out: DealtOut, rank: int, q: Tensor, width: int, mask: Tensor | None) -> RankQueries:
        """The queries of `rank`."""
        return RankQueries(
            q, moved(dealt_out.order.runs[rank], dealt_out.start), Visible(True, self._window, self._chunk),
            width=width, scale=self._scale, softcap=self._softcap, mask=mask,
        )  # fmt: skip

    def _add(
        self, queries: RankQueries, run: ShardedRun, dealt_out: DealtOut, rank: int, source: int, kept: Block
    ) -> None:
        """What the queries of one `rank` see of what another, `source`, keeps."""
        is_limited = self._window is not None or self._chunk is not None
        runs = dealt_out.runs_of(source, is_limited=is_limited)
        kept = kept.mapped(self._kv_map)
        if runs is not None:
            queries.add(Block(kept.keys, kept.values, runs))
        else:
            held = run.held(self._keys.slots)[source]
            queries.add_masked(kept.keys, kept.values, run.positions[:, dealt_out.tokens[rank]], held)

    def _exchange_heads(
        self, run: ShardedRun, dealt_out: DealtOut, q: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        order, before = dealt_out.order, dealt_out.before
        is_known = before is not None and self._window is None and self._chunk is None and mask is None
        slots = self._keys.slots
        seen = before[self._channel.coordinate] + q.shape[2] if before and is_known else min(run.seen, slots)
        past, own = (0, dealt_out.start), (dealt_out.start, dealt_out.start + order.total)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, kv_map: list[int] | None
        ) -> Tensor:
            if is_known and sinks is None and kv_map is None and self._softcap is None and can_flash(q, v):
                found: Tensor = flash_attention(q, k, v, scale=self._scale)
                return found
            queries = RankQueries(
                q, (own,), Visible(True, self._window, self._chunk),
                width=v.shape[-1], scale=self._scale, softcap=self._softcap, mask=mask,
            )  # fmt: skip
            block = Block(k, v, (past, own) if past[1] else (own,)).mapped(kv_map)
            if is_known:
                queries.add(block)
            else:
                held = run.held(slots).transpose(0, 1).flatten(1)
                queries.add_masked(block.keys, block.values, run.positions, held)
            return queries.result(sinks)

        rows = {"past": before} if is_known else {"kv_rows": [seen] * order.parts}
        return by_heads(
            self._channel, q, self._keys.read(run.rows, seen), self._values.read(run.rows, seen), attend,
            queries=order, mask=mask, sinks=sinks, kv_map=self._kv_map, **rows,
        )  # fmt: skip


class ShardedLatent:
    """One `latent_sequence_attention`. rows: of its state, [max_batch, 1, slots + 1, R + E]."""

    def __init__(
        self,
        rows: StateRows,
        run: Callable[[], ShardedRun],
        channel: Any,
        *,
        how: str,
        order: str,
        scale: float,
        window: int | None,
        chunk: int | None,
        softcap: float | None,
    ) -> None:
        self._rows, self._run, self._channel, self._how, self._order = rows, run, channel, how, order
        self._window, self._chunk = window, chunk
        self._options: dict[str, Any] = {"scale": scale, "softcap": softcap}

    def __call__(
        self,
        q: Tensor,
        carried_q: Tensor | None,
        latent: Tensor,
        carried: Tensor | None,
        key_weight: Tensor,
        value_weight: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        run = require_kind(self._run(), self._how, self._channel)
        new = latent if carried is None else torch.cat([latent, carried], -1)
        keep(run, self._rows, new[:, None], self._channel)
        made = OfLatent(key_weight, value_weight, q, carried_q)
        if run.dealt_out is not None:
            return self._exchange(run, run.dealt_out, made, mask, sinks)
        hidden = run.hidden(
            self._channel.coordinate, self._rows.slots, self._window, self._chunk, self._rows.state.dtype
        )
        (absorbed,) = made.absorbed()
        keys, values = absorbed.made_of(self._rows.read(run.rows, min(run.seen, self._rows.slots)))
        mask = hidden if mask is None else mask.to(q.dtype) + hidden
        out, lse = partial_attention(absorbed.q, keys, values, mask=mask, **self._options)
        out = absorbed.values_of(out.to(accumulating(q.dtype)))
        return merged_over(self._channel, torch.cat([out, lse[..., None]], -1), sinks).to(q.dtype)

    def _exchange(
        self, run: ShardedRun, dealt_out: DealtOut, made: OfLatent, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        order, own, seen = dealt_out.order, self._channel.coordinate, min(run.seen, self._rows.slots)
        is_limited = self._window is not None or self._chunk is not None
        groups = made.groups(seen, total=seen * order.parts)
        queries = [
            RankQueries(
                group.q, moved(order.runs[own], dealt_out.start), Visible(True, self._window, self._chunk),
                width=group.width, mask=of_heads(mask, group.heads, made.num_heads), **self._options,
            )
            for group in groups
        ]  # fmt: skip
        for source, message in brought(self._channel, self._rows.packed(run.rows, seen), self._how):
            rows, runs = self._rows.unpacked(message), dealt_out.runs_of(source, is_limited=is_limited)
            for group, mine in zip(groups, queries, strict=True):
                keys, values = group.made_of(rows)
                if runs is not None:
                    mine.add(Block(keys, values, runs))
                else:
                    held = run.held(self._rows.slots)[source]
                    mine.add_masked(keys, values, run.positions[:, dealt_out.tokens[own]], held)
        outs = [group.values_of(mine.seen.out) for group, mine in zip(groups, queries, strict=True)]
        lse = torch.cat([mine.seen.lse for mine in queries], 1)
        return with_sinks(torch.cat(outs, 1), lse, sinks).to(made.dtype)


def require_kind(run: ShardedRun, how: str, channel: Any) -> ShardedRun:
    """Raise where a node is for runs whose tokens are dealt out and those of this one are not, or the reverse."""
    if how == "merge" and run.dealt_out is not None:
        raise InputError(
            f"node {channel.node!r} is for runs that every rank has all of; the tokens of this one are dealt out"
        )
    if how != "merge" and run.dealt_out is None:
        raise InputError(
            f"node {channel.node!r} is for runs whose tokens are dealt out; every rank has all of this one"
        )
    return run


def keep(run: ShardedRun, rows: StateRows, x: Tensor, channel: Any) -> Tensor:
    """Keeps what a rank has of a run's tokens, [B, G, S_i, D]; as it will be read."""
    dealt_out = run.dealt_out
    if dealt_out is not None and dealt_out.before is not None:
        first = dealt_out.before[channel.coordinate]
        if first + x.shape[2] <= rows.slots:  # they lie one after the other
            return rows.put(run.rows, slice(first, first + x.shape[2]), x)
    return rows.put(run.rows, run.slots[rows.slots], x)


def brought(channel: Any, message: Tensor, how: str) -> Iterator[tuple[int, Tensor]]:
    """What each rank brings, by a ring or a gather."""
    if how != "gather":
        return around(channel, message)
    return enumerate(channel.all_gather(message[None], dim=0).unbind(0))


def merged_over(channel: Any, packed: Tensor, sinks: Tensor | None) -> Tensor:
    """What the parts [B, H, S, Dv + 1] of all ranks are together: on every rank the same bits."""
    parts = channel.all_gather(packed[None], dim=0)
    return with_sinks(*merge_parts(parts[..., :-1], parts[..., -1]), sinks)
