"""How many blocks a paged cache has: as many as the size asked for, or as memory has room for, the same on all ranks.

bytes = (blocks + 1) * block size * bytes per token + rows * bytes per sequence
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.communication.communicator import Communicator
from runtime.kv_cache.cache_size import ANY_LENGTH, CacheSize, Room, longest_text, slots_for, step_of
from runtime.kv_cache.paged_cache import PagedCache
from runtime.program.rank_program import RankProgram
from runtime.program.shards import StateShard

__all__ = ["DEFAULT_ROWS", "PagedSize"]

DEFAULT_ROWS = 32
_BLOCK = {"cpu": 16, "cuda": 64}
_DEFAULT_MEMORY = "0.5 of free"
_MOST_TOKENS = 1 << 22
"""Of a cache that nobody gave a size."""


@dataclass(frozen=True)
class PagedSize:
    """`blocks` of `block_size` tokens; rows: how many sequences at a time. longest: text that the model takes.

    step: the most tokens of a row in one run. unlimited: nothing is kept per token, so that a block is any length.
    """

    blocks: int
    block_size: int
    rows: int
    longest: int | None
    step: int
    room: Room
    unlimited: bool = False
    spare: int = 0
    """Rows beside those of sequences, for what nobody is to read."""

    @classmethod
    def agreed(
        cls,
        program: RankProgram,
        size: CacheSize | None,
        communicator: Communicator,
        device: torch.device,
        *,
        step: int,
        rows: int | None = None,
        block_size: int | None = None,
    ) -> PagedSize:
        """A collective, as `Room.agreed`, and raises as `Room.require`. rows: None for those of `size`."""
        wanted = CacheSize(max_batch=DEFAULT_ROWS, memory=_DEFAULT_MEMORY) if size is None else size
        rows = rows or wanted.max_batch
        block = block_size or _BLOCK.get(device.type, 16)
        limit = longest_text(program)
        spare = 1 if program.batch_axes else 0

        def fit(room: int) -> int | None:
            """Tokens per sequence, all rows together having the blocks."""
            blocks = _blocks_within(program.states, room, rows=rows + spare, block_size=block)
            return None if blocks is None else max(0, blocks * block // wanted.max_batch)

        room = Room.of(program, wanted, communicator, device, fit)
        # stages may keep nothing per token where others do
        if room.tokens is None and room.bytes is not None:
            step = step_of(program, step, ANY_LENGTH)
            return cls(rows, ANY_LENGTH, rows, limit, step, room, unlimited=True, spare=spare)
        if wanted.max_length is not None:
            room.require(wanted.max_length)
            each = -(-slots_for(program, wanted.max_length) // block)
        else:
            assert room.tokens is not None
            room.require(1)
            each = max(1, room.tokens // block)
            if limit is not None:
                each = min(each, -(-limit // block))
            if size is None:
                each = min(each, max(1, _MOST_TOKENS // block // wanted.max_batch))
        blocks, step = each * wanted.max_batch, step_of(program, step, each * block)
        return cls(blocks, block, rows, limit, step, room, spare=spare)

    @property
    def tokens(self) -> int | None:
        """How many fit, of all sequences together; None: any number."""
        return None if self.unlimited else self.blocks * self.block_size

    def make(self, states: Sequence[StateShard], device: torch.device) -> PagedCache:
        most = ANY_LENGTH if self.unlimited else self.blocks * self.block_size
        return PagedCache(
            states,
            # what keeps nothing per token has no blocks to set aside
            blocks=0 if self.unlimited else self.blocks,
            block_size=1 if self.unlimited else self.block_size,
            max_batch=self.rows + self.spare,
            max_length=most if self.longest is None else min(most, self.longest),
            step=self.step,
            device=device,
        )


def _blocks_within(states: Sequence[StateShard], room: int, *, rows: int, block_size: int) -> int | None:
    each = block_size * sum(state.bytes for state in states if state.per_token)
    left = room - rows * sum(state.bytes for state in states if not state.per_token)
    if not each:
        return None if left >= 0 else 0
    return max(0, left // each - 1)
