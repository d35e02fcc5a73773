"""What a scheduler of many requests is given, and what it says: its limits, a step, and what has been done."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import NamedTuple

from runtime.generation.batching.prefixes.row_texts import SharedOut

__all__ = ["Counts", "Limits", "Turn", "Work"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What there is: `blocks` of `block_size` tokens each, and `rows` for sequences."""

    rows: int
    blocks: int
    block_size: int
    budget: int
    """The most tokens of prompts in one step, those included with which short rows are filled up."""
    beside: int | None = None
    """The same while others wait for their next token, which take it in every such step, or after it; None: as
    `budget`."""
    packs: bool = False
    """Whether pieces of prompts, of any lengths, and single tokens of others run in one step."""
    one_prompt_below: int = 0
    """Where prompts and single tokens run in one step: of how few tokens of prompts all that could run are to be, for
    one to run at a time. Such a step is captured, and several are sooner done than one that is not."""
    piece: int | None = None
    """The most tokens of one sequence in one step; 1: prompts run token by token, in the steps of the others."""
    alike: bool = False
    """Whether sequences that run pieces of their prompts together must run as many tokens each."""
    longest: int | None = None
    """The most tokens of one sequence; None: as many as all blocks have room for."""
    keeps_prefixes: bool = True
    sees: int | None = None
    """How many positions back a token looks in any layer, its own among them; None: to the first."""
    shared_out: SharedOut | None = None
    """Blocks are rows that ranks share out, as long as the longest sequence."""
    groups: int = 1

    @property
    def room(self) -> int:
        """The most tokens that are ever run of one sequence."""
        return min(self.blocks * self.block_size, self.longest or sys.maxsize)


class Turn(NamedTuple):
    """What one sequence runs in a step: tokens `start` to `start + count`."""

    number: int
    row: int
    start: int
    tokens: tuple[int, ...]
    samples: bool
    """Whether these are its last tokens, so that the next one can be chosen."""
    table: tuple[int, ...]
    """Its blocks, as far as this step needs them; `Limits.blocks` in the place of those behind what a token sees."""
    admission: int
    """Of several times that it was given a row, which one this is."""
    keys: tuple[bytes, ...] = ()
    """Of the blocks that this step completes."""
    source: tuple[int, int] | None = None
    """Of a row that ranks share out: it takes over so many tokens of that row, which may be itself, before it runs."""


@dataclass(frozen=True)
class Work:
    """One step. decode: every sequence runs one token. packed: the tokens of all stand behind each other in one row."""

    turns: tuple[Turn, ...]
    decode: bool
    group: int
    packed: bool = False


@dataclass
class Counts:
    """What has been done since the start, in tokens; and how often a sequence lost its place."""

    prefix_hits: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    blocks_behind: int = 0
    """Blocks that running sequences gave back, because no layer looks back so far."""
