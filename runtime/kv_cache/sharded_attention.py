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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.kv_cache.sharded_slots import Appended, KeptTokens
from runtime.kv_cache.slots import minus_infinity
from runtime.ops.kernels.decode_attention import Attending, can_decode, decode_attention, registered
from runtime.ops.rows.attend_runs import Block, RankQueries
from runtime.ops.rows.exchange_keys import around, filled_up
from runtime.ops.rows.partial_attention import accumulating, merge_parts, partial_attention, with_sinks
from runtime.ops.rows.sequence_attention import attend_over_ranks
from runtime.ops.rows.token_order import TokenOrder
from runtime.ops.rows.ulysses import by_heads, heads_of, kv_of
from runtime.ops.rows.visible import Visible

__all__ = ["DealtOut", "ShardedAttention", "ShardedRun"]


@dataclass(frozen=True)
class DealtOut:
    """What is known of a run in which each rank has its own tokens."""

    order: TokenOrder
    tokens: tuple[Tensor, ...]
    """Which of the run's tokens each rank has."""
    has_past: bool
    """Whether anything was kept before."""
    start: int
    before: tuple[int, ...] | None
    """How many tokens each rank had kept, where that is the same for all rows, which go on at `start` together."""


@dataclass
class ShardedRun:
    """What the cache knows of a run before it starts."""

    rows: slice
    positions: Tensor
    """[B, S], of all its tokens."""
    slots: dict[int, Tensor]
    """By number of slots: where the tokens of this rank are kept, [B, S] or, if they are dealt out, [B, S_i]."""
    seen: int
    """How many slots of a rank are looked at, at most."""
    kept: KeptTokens
    dealt_out: DealtOut | None = None
    appended: Appended | None = None
    """What is known of a run that every rank has all of, in the place of that."""
    masks: dict[Any, Tensor] = field(default_factory=dict)

    def held(self, count: int) -> Tensor:
        """Which positions lie in the slots that are looked at, of every rank: [n, B, T]."""
        return self.kept.held[count][:, self.rows, : min(self.seen, count)]

    def hidden(self, rank: int, count: int, window: int | None, chunk: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, S, T], added to the scores of all tokens for what `rank` keeps."""
        key = (rank, count, window, chunk, dtype)
        if key not in self.masks:
            self.masks[key] = minus_infinity(self.positions, self.held(count)[rank][:, None], window, chunk, dtype)
        return self.masks[key]


class ShardedAttention:
    """One `cached_sequence_attention`. `buffers`: keys and values [max_batch, G, slots + 1, D or Dv] of its state."""

    def __init__(
        self,
        buffers: Callable[[], tuple[Tensor, Tensor]],
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
        self._buffers, self._run, self._channel = buffers, run, channel
        self._how, self._neighbours, self._order = how, neighbours, order
        self._scale, self._softcap = scale, softcap
        self._window, self._chunk = window, chunk
        self._kv_map = None if kv_map is None else list(kv_map)
        keys, values = buffers()
        self.has_kernel = (
            how == "merge"
            and window is None
            and chunk is None
            and kv_map is None
            and can_decode(keys, values, keys.dtype)
        )
        """Whether one token of each row is kept and attended to by the kernel of `decode_attention`."""
        packed = Attending(self._packed_by_kernel, values.shape[-1] + 1, dtype=torch.float32)
        self._by_kernel = registered(packed)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        if self._how == "merge" and self._run().dealt_out is not None:
            raise InputError(
                f"node {self._channel.node!r} is for runs that every rank has all of; the tokens of this one "
                "are dealt out"
            )
        if self.has_kernel and q.shape[2] == 1 and mask is None:
            return self._merged(self._by_kernel(q, k, v, positions, None), sinks).to(q.dtype)
        run, (keys, values) = self._run(), self._buffers()
        self._keep(run, keys, k)
        self._keep(run, values, v)
        if self._how == "merge":
            return self._merge(run, q, keys, values, mask, sinks)
        dealt_out = run.dealt_out
        if dealt_out is None:
            raise InputError(
                f"node {self._channel.node!r} is for runs whose tokens are dealt out; every rank has all of this one"
            )
        if not dealt_out.has_past:
            return attend_over_ranks(
                self._channel, q, k, v, dealt_out.order.total, mask, sinks,
                how=self._how, neighbours=self._neighbours, parts=dealt_out.order.parts,
                 order=self._order, causal=True, scale=self._scale,
                window=self._window, chunk=self._chunk, softcap=self._softcap, kv_map=self._kv_map,
            )  # fmt: skip
        alike = mask is None or mask.dim() < 2 or mask.shape[-2] == 1
        if self._how != "gather" and alike and self._queries_are_less(run, dealt_out, q, keys, values):
            return self._exchange_queries(run, dealt_out, q, keys, values, mask, sinks)
        if self._how == "ulysses":
            return self._exchange_heads(run, dealt_out, q, keys, values, mask, sinks)
        return self._exchange_keys(run, dealt_out, q, keys, values, mask, sinks)

    def _keep(self, run: ShardedRun, buffer: Tensor, x: Tensor) -> None:
        count, dealt_out = buffer.shape[2] - 1, run.dealt_out
        if dealt_out is not None and dealt_out.before is not None:
            first = dealt_out.before[self._channel.coordinate]
            if first + x.shape[2] <= count:  # they lie one after the other
                buffer[run.rows, :, first : first + x.shape[2]] = x
                return
        rows = torch.arange(run.rows.start, run.rows.stop, device=x.device)[:, None]
        buffer[rows, :, run.slots[count]] = x.transpose(1, 2)

    def _merge(
        self, run: ShardedRun, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        count = keys.shape[2] - 1
        hidden = run.hidden(self._channel.coordinate, count, self._window, self._chunk, keys.dtype)
        block = self._used(run, keys, values)
        out, lse = partial_attention(
            q, block.keys, block.values, scale=self._scale, softcap=self._softcap,
            mask=hidden if mask is None else mask.to(q.dtype) + hidden,
        )  # fmt: skip
        return self._merged(torch.cat([out.to(accumulating(q.dtype)), lse[..., None]], -1), sinks).to(q.dtype)

    def _merged(self, packed: Tensor, sinks: Tensor | None) -> Tensor:
        """What the parts [B, H, S, Dv + 1] of all ranks are together: on every rank the same bits."""
        parts = self._channel.all_gather(packed[None], dim=0)
        return with_sinks(*merge_parts(parts[..., :-1], parts[..., -1]), sinks)

    def _packed_by_kernel(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, sinks: Tensor | None) -> Tensor:
        """The part of this rank. To the kernel a row is as long as what this rank keeps of it.

        The kernel appends what it is given: on a rank that does not keep the token, that is the last one that it keeps.
        """
        run, (keys, values) = self._run(), (each[self._run().rows] for each in self._buffers())
        assert run.appended is not None
        is_own, before = run.appended.is_own, run.appended.before
        at, rows = (before - (~is_own).long()).clamp(min=0), torch.arange(q.shape[0], device=q.device)[:, None]
        k, v = (
            torch.where(is_own[..., None, None], new, kept[rows, :, at].transpose(1, 2))
            for new, kept in ((k, keys), (v, values))
        )
        out, lse = decode_attention(
            q, k, v, at, keys, values, scale=self._scale, softcap=self._softcap, return_lse=True
        )  # fmt: skip
        has_none = (~is_own & (before == 0))[..., None]
        lse = lse[..., None].masked_fill(has_none, -torch.inf)
        return torch.cat([out.float().masked_fill(has_none[..., None], 0), lse[..., None]], -1)

    def _used(self, run: ShardedRun, keys: Tensor, values: Tensor) -> Block:
        """What this rank keeps of the run's rows, as far as anyone looks; by query head where these share none."""
        seen = min(run.seen, keys.shape[2] - 1)
        return Block(keys[run.rows, :, :seen], values[run.rows, :, :seen], ()).mapped(self._kv_map)

    def _exchange_keys(
        self, run: ShardedRun, dealt_out: DealtOut, q: Tensor, keys: Tensor, values: Tensor,
        mask: Tensor | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        seen, width, own = min(run.seen, keys.shape[2] - 1), keys.shape[-1], self._channel.coordinate
        queries = self._queries_of(dealt_out, own, q, values.shape[-1], mask)
        message = torch.cat([keys[run.rows, :, :seen], values[run.rows, :, :seen]], -1)
        for source, rows in self._brought(message):
            self._add(queries, run, dealt_out, own, source, Block(rows[..., :width], rows[..., width:], ()))
        return with_sinks(queries.seen.out, queries.seen.lse, sinks).to(q.dtype)

    def _exchange_queries(
        self, run: ShardedRun, dealt_out: DealtOut, q: Tensor, keys: Tensor, values: Tensor,
        mask: Tensor | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The queries of each rank come to what this one keeps, and what they have seen goes back."""
        order, own, (batch, heads, size, _), width = (
            dealt_out.order,
            self._channel.coordinate,
            q.shape,
            values.shape[-1],
        )
        seen = min(run.seen, keys.shape[2] - 1)
        kept = Block(keys[run.rows, :, :seen], values[run.rows, :, :seen], ())
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

    def _queries_are_less(self, run: ShardedRun, dealt_out: DealtOut, q: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether fewer bytes travel if the queries do: behind a long past, for a short run; the same on all ranks.

        Of what one rank sends to another: keys and values of all kv heads, or of those that the other's heads read,
        with the queries of these and their results.
        """
        most, (_, heads, _, size), value = max(dealt_out.order.counts), q.shape, values.shape[3]
        kv_heads, sent = keys.shape[1], 0
        if self._how == "ulysses":
            shares = heads_of(dealt_out.order.parts, heads, kv_of(q, keys, self._kv_map))
            kv_heads = max(len(share.kv) for share in shares)
            sent = most * max(share.count for share in shares) * (size + value) * q.itemsize
        kept = min(run.seen, keys.shape[2] - 1) * kv_heads * (size + value) * keys.itemsize
        parts = (value + 1) * accumulating(q.dtype).itemsize
        return most * heads * (size * q.itemsize + parts) < kept + sent

    def _queries_of(self, dealt_out: DealtOut, rank: int, q: Tensor, width: int, mask: Tensor | None) -> RankQueries:
        """The queries of `rank`."""
        return RankQueries(
            q, _moved(dealt_out.order.runs[rank], dealt_out.start), Visible(True, self._window, self._chunk),
            width=width, scale=self._scale, softcap=self._softcap, mask=mask,
        )  # fmt: skip

    def _add(
        self, queries: RankQueries, run: ShardedRun, dealt_out: DealtOut, rank: int, source: int, kept: Block
    ) -> None:
        """What the queries of one `rank` see of what another, `source`, keeps."""
        order, before = dealt_out.order, dealt_out.before
        kept = kept.mapped(self._kv_map)
        # slots that were written twice, and sights that end, are told from positions only
        if before is not None and self._window is None and self._chunk is None:
            runs = ((0, before[source]), *_moved(order.runs[source], dealt_out.start))
            queries.add(Block(kept.keys, kept.values, tuple(each for each in runs if each[0] < each[1])))
        else:
            held = run.held(self._buffers()[0].shape[2] - 1)[source]
            queries.add_masked(kept.keys, kept.values, run.positions[:, dealt_out.tokens[rank]], held)

    def _brought(self, message: Tensor) -> Iterator[tuple[int, Tensor]]:
        if self._how != "gather":
            return around(self._channel, message)
        return enumerate(self._channel.all_gather(message[None], dim=0).unbind(0))

    def _exchange_heads(
        self, run: ShardedRun, dealt_out: DealtOut, q: Tensor, keys: Tensor, values: Tensor,
        mask: Tensor | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        count, order = keys.shape[2] - 1, dealt_out.order
        seen = min(run.seen, count)
        held = run.held(count).transpose(0, 1).flatten(1)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, kv_map: list[int] | None
        ) -> Tensor:
            queries = RankQueries(
                q, ((0, order.total),), Visible(True, self._window, self._chunk),
                width=v.shape[-1], scale=self._scale, softcap=self._softcap, mask=mask,
            )  # fmt: skip
            block = Block(k, v, ()).mapped(kv_map)
            queries.add_masked(block.keys, block.values, run.positions, held)
            return with_sinks(queries.seen.out, queries.seen.lse, sinks).to(q.dtype)

        return by_heads(
            self._channel, q, keys[run.rows, :, :seen], values[run.rows, :, :seen], attend,
            queries=order, mask=mask, sinks=sinks, kv_map=self._kv_map, kv_rows=[seen] * order.parts,
        )  # fmt: skip


def _moved(runs: tuple[tuple[int, int], ...], start: int) -> tuple[tuple[int, int], ...]:
    return tuple((first + start, last + start) for first, last in runs)
