"""Slots: where a state keeps the token of a row at a position.

    find(rows, positions)   (block, offset) of each token; here a row is one block, so the block is the row

One function says it for all that reads and writes a cache. Rows that share blocks, or a row of many blocks
(PagedAttention, arXiv:2309.06180, section 4.1), are another `find`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kv_cache.batch import Batch
from runtime.ops.attention import allowed
from runtime.program.shards import StateShard

__all__ = ["Slots", "hidden_slots", "minus_infinity", "slots_of"]


@dataclass(frozen=True)
class Slots:
    """`count` slots for each row; position p lies in slot p % count, so that the latest ones are kept."""

    count: int

    def find(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`rows` [B, 1], `positions` [B, S]: blocks and offsets, which index the first and the slot dim of a buffer."""
        return rows, positions % self.count

    def held(self, positions: Tensor, seen: int, *, wraps: bool) -> Tensor:
        """Which position each of the first `seen` slots holds after a run of `positions`: [seen] or [B, 1, seen].

        wraps: whether slots have been written more than once; then a slot holds the latest position that lies in it,
        negative where there is none yet.
        """
        slot = torch.arange(seen, device=positions.device)
        if not wraps:
            return slot
        last = positions[:, -1:]
        return (last - (last - slot) % self.count)[:, None, :]


def slots_of(state: StateShard, *, max_length: int, step: int) -> int:
    """How many slots a row needs: all positions up to `max_length`, or what a window and one call's tokens need.

    A layer that sees n positions back, in calls of at most `step` tokens, needs n + step - 1: the first token of a call
    still sees n - 1 before it when the last one has been written.
    """
    return max_length if state.sees is None else min(max_length, state.sees + step - 1)


def minus_infinity(
    positions: Tensor, held: Tensor, window: int | None, chunk: int | None, dtype: torch.dtype
) -> Tensor:
    """[B, 1, S, T], added to scores: where a query at `positions` must not look at what the slots hold."""
    visible = allowed(positions[:, :, None], held, causal=True, window=window, chunk=chunk)
    zero = torch.zeros(visible.shape, dtype=dtype, device=positions.device)
    return zero.masked_fill(~visible, -torch.inf)[:, None]


def hidden_slots(
    tokens: Batch, seen: int, slots: int, window: int | None, chunk: int | None, dtype: torch.dtype
) -> Tensor | None:
    """The same of the first `seen` of `slots`, for a run of `tokens`; None where each may look everywhere."""
    positions, wraps = tokens.positions, slots < tokens.end
    one_token = tokens.start is not None and positions.shape[1] == 1
    near = (window is None or window >= tokens.end) and (chunk is None or chunk >= tokens.end)
    if one_token and near and not wraps:
        return None
    held = Slots(slots).held(positions, seen, wraps=wraps)
    return minus_infinity(positions, held, window, chunk, dtype)
