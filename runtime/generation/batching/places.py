"""Where in a rank's cache sequences lie, and how a step of the scheduler becomes a run of the rank's programs.

    InBlocks   in blocks of one pool, any of them; equal prefixes lie there once              `PagedCache`
    InRows     each in a row of its own, where ranks share out the tokens of a sequence       `ShardedCache`

To the scheduler a row is a block that is as long as the longest sequence. A step of single tokens takes all rows from
the first to the last that has a turn: those between them repeat what they have, which changes nothing. Equal prefixes
are copied from row to row: they take their memory again, and no work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.communication.communicator import Communicator
from runtime.execution.prompts.piece import Piece, row_sizes
from runtime.generation.batching.packing import TOKENS_SHARED_OUT, why_not_packed
from runtime.generation.batching.prefixes.row_texts import SharedOut
from runtime.generation.batching.work import Limits, Turn, Work
from runtime.generation.decode_graphs.decoder import Decoder
from runtime.generation.steps import Steps
from runtime.kv_cache.batch import PagedRows
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.cache_size import CacheSize, Room, WhatIsKept, default_step, held_as, slots_for, step_of
from runtime.kv_cache.paged_cache import PagedCache
from runtime.kv_cache.paged_size import DEFAULT_ROWS, PagedSize
from runtime.kv_cache.sharded_cache import ShardedCache, cache_for
from runtime.kv_cache.sharded_slots import uneven_prefix
from runtime.program.rank_program import RankProgram

__all__ = ["InBlocks", "InRows", "Places", "Run", "places_for", "why_eager"]

_DEFAULT_MEMORY = "0.5 of free"
_BESIDE, _BESIDE_ON_GPU = 128, 2048
"""Tokens of prompts between two tokens of others. On a CPU a step takes as long as it has tokens. A GPU has computed
fewer than these of an 8B decoder before its host has launched the step: less would make a prompt later, and nobody
sooner.
"""
_MOST_TOKENS = 1 << 15
"""Of a row, where nobody gave a size."""
_GIVEN_UP = (
    "the ranks of {} share out the tokens of each sequence, and a layer that sees some tokens back keeps no others: "
    "those of a prefix are gone"
)
_SUMS_UP = (
    "the model keeps a state per sequence, which sums up all its tokens so far: that of a prefix is gone when the next "
    "token has been run"
)


@dataclass(frozen=True)
class Run:
    """A step as the programs take it; at: which row of the piece each turn is.

    least: how many tokens each row is filled up to, if not more. like: as `Executable` has it. others: where ranks have
    sequences of their own, what each of them runs in this step, this one too; None: nothing.
    """

    work: Work
    piece: Piece
    rows: slice | PagedRows
    at: tuple[int, ...]
    least: int = 1
    like: Hashable = None
    others: tuple[Work | None, ...] = ()

    @property
    def works(self) -> tuple[Work | None, ...]:
        """Of each rank that has sequences of its own; of the one there is."""
        return self.others or (self.work,)

    def turns(self) -> Iterator[Turn]:
        """Of all of these."""
        return (turn for work in self.works if work is not None for turn in work.turns)

    @property
    def latest(self) -> int:
        """The largest position at which one of these begins."""
        return max(turn.start for turn in self.turns())


class Places(Protocol):
    """See the module's docstring. limits: for the scheduler, but for its groups."""

    limits: Limits
    room: Room
    tokens: int | None
    """How many fit, of all sequences together; None: any number."""
    why_not_kept: str
    """Why equal prefixes are not kept once; "": they are."""
    why_not_packed: str
    """Why pieces of prompts and single tokens run in different steps; "": they run in one."""
    cache: Cache

    def rows_of(self, work: Work) -> int:
        """How many rows a run of it has."""
        ...

    def run_of(self, work: Work, last: Callable[[int], tuple[int, int]], *, count: int = 0) -> Run:
        """last: of a row, the last token that the cache has of it and its position; (0, 0) where it has none.

        count: how many rows there are at least, of which some are nobody's: what is computed for them is kept nowhere.
        """
        ...

    def before(self, run: Run) -> None:
        """On each rank, just before it carries out a run."""
        ...

    def clear(self, blocks: list[int]) -> None:
        """What lies there may be no numbers, and nobody reads it again."""
        ...


class InBlocks:
    """See the module's docstring."""

    def __init__(
        self, program: RankProgram, size: PagedSize, device: torch.device, *, budget: int, kept: WhatIsKept,
        why_not_packed: str,
    ) -> None:  # fmt: skip
        self._size = size
        self.room, self.tokens = size.room, size.tokens
        self.cache: Cache = size.make(program.states, device)
        self.groups, self.sizes = 1, [size.rows]
        """Rows of steps that are compiled or captured, in ascending order; see `prepare`."""
        self.why_not_kept, self.why_not_packed = _SUMS_UP if kept.counts_tokens else "", why_not_packed
        self.limits = Limits(
            rows=size.rows,
            blocks=size.blocks,
            block_size=size.block_size,
            budget=budget,
            beside=_BESIDE if device.type == "cpu" else _BESIDE_ON_GPU,
            packs=not why_not_packed,
            piece=program.limits.get("sequence", (1, None))[1],
            # a state per sequence would count a token twice with which a shorter row is filled up
            alike=kept.counts_tokens,
            keeps_prefixes=not self.why_not_kept,
            sees=kept.sees,
        )

    def rows_of(self, work: Work) -> int:
        return len(work.turns)

    def run_of(self, work: Work, last: Callable[[int], tuple[int, int]], *, count: int = 0) -> Run:
        """Rows of nobody stand behind the others, and lie where nobody reads."""
        order = _order(work)
        turns, missing = [work.turns[at] for at in order], max(0, count - len(work.turns))
        piece = Piece(
            [*(list(turn.tokens) for turn in turns), *([0] for _ in range(missing))],
            [*(turn.start for turn in turns), *[0] * missing],
            tuple(at < len(turns) for at in range(len(turns) + missing)),
            completes=tuple(turn.samples for turn in turns),
            packed=work.packed,
        )
        numbers = (*(turn.row for turn in turns), *[self._size.rows] * missing)
        rows = PagedRows(numbers, (*(turn.table for turn in turns), *[()] * missing))
        # of packed rows, those that are not told a token have no logits, and nobody asks where they would be
        told = itertools.accumulate((turn.samples or not work.packed for turn in turns), initial=0)
        at = dict(zip(order, told, strict=False))
        return Run(work, piece, rows, tuple(at[turn] for turn in range(len(turns))))

    def rows_at(self, work: Work) -> list[int]:
        """Which row of a run of single tokens each turn is."""
        order = _order(work)
        return sorted(range(len(order)), key=order.__getitem__)

    def before(self, run: Run) -> None:
        """Nothing: a run says all that the cache has to know."""

    def decode(self, steps: Steps, run: Run, received: Sequence[Tensor] = ()) -> Any:
        """Logits [n, 1, V/r], or what a stage hands on, by a compiled or captured step of as many rows or some more."""
        decoder, tokens, positions = self.decoder(steps, run)
        return decoder.of_first(len(run.piece.tokens), tokens, positions, received, latest=run.latest)

    def decoder(self, steps: Steps, run: Run) -> tuple[Decoder, list[int], list[int]]:
        """The captured step that a run of single tokens takes, with its tokens and positions; it knows their blocks."""
        assert isinstance(self.cache, PagedCache)
        assert isinstance(run.rows, PagedRows)
        count = len(run.piece.tokens)
        group = run.work.group if self.groups > 1 else 0  # where there is one, it says whose a work is
        batch = next(size for size in self.sizes if count <= size)
        self.cache.fix(run.rows, batch, group=group)
        rest = [0] * (batch - count)
        tokens, positions = [row[0] for row in run.piece.tokens] + rest, [*run.piece.starts, *rest]
        return steps.decoder(batch, group=group), tokens, positions

    def fix(self, decoder: Decoder, turns: Sequence[Turn], at: Sequence[int]) -> None:
        """Tells a captured step the blocks of its next run; at: which of its rows each turn is."""
        assert isinstance(self.cache, PagedCache)
        tables: list[tuple[int, ...]] = [()] * decoder.batch
        for row, turn in zip(at, turns, strict=True):
            tables[row] = turn.table
        self.cache.fix(PagedRows((), tuple(tables)), decoder.batch, group=decoder.group)

    def prepare(self, *, groups: int, few_sizes: bool) -> None:
        """Before steps are compiled or captured. groups: how many take turns.

        few_sizes: a step of one row and one of all; otherwise of each power of four, and of a group's share, as well.
        """
        most, self.groups = self.limits.rows, groups
        self.sizes = sorted({1, most}) if few_sizes else sorted({*row_sizes(most), -(-most // groups)})

    def decoder_of_nobody(self, steps: Steps, size: int, *, group: int = 0) -> Decoder:
        """A captured step of so many rows of nobody."""
        assert isinstance(self.cache, PagedCache)
        self.cache.fix(PagedRows((), ()), size, group=group)
        return steps.decoder(size, group=group)

    def of_nobody(self, size: int, tokens: int) -> Run:
        """A prompt amid so many rows with long texts, or one less; none of these is anybody's."""
        row, far = self._size.rows, self.cache.max_length - 1
        others = min(size, self.limits.rows - 1)
        turns = [*[Turn(-1, row, far, (0,), True, (), 0)] * others, Turn(-1, row, 0, (0,) * tokens, True, (), 0)]
        return self.run_of(Work(tuple(turns), decode=False, group=0, packed=True), lambda _: (0, 0))

    def clear(self, blocks: list[int]) -> None:
        assert isinstance(self.cache, PagedCache)
        self.cache.clear(blocks)


class InRows:
    """See the module's docstring; `rows` of `max_length` tokens."""

    def __init__(
        self,
        program: RankProgram,
        room: Room,
        device: torch.device,
        *,
        rows: int,
        max_length: int,
        step: int,
        axes: tuple[str, ...],
        keeps: bool,
    ) -> None:
        """keeps: whether all tokens of a row are kept, on all stages, so that another may take over its first ones."""
        self.room = room
        self.tokens: int | None = rows * max_length
        self.cache: Cache = cache_for(
            program,
            max_batch=rows,
            max_length=max_length,
            step=step,
            device=device,
            slots=slots_for(program, max_length),
        )
        self.axes, self.why_not_packed = ", ".join(axes), TOKENS_SHARED_OUT
        self.why_not_kept = "" if keeps else _GIVEN_UP.format(self.axes)
        # as `ShardedCache.piece_size`, also on a stage without attention, whose cache shares out nothing
        parts = program.mesh.size(*axes)
        budget = step if step < parts else step - step % parts
        self.limits = Limits(
            rows=rows,
            blocks=rows,
            block_size=max_length,
            budget=budget,
            piece=program.limits.get("sequence", (1, None))[1],
            # a row that is filled up, or not at the others' position, would be attended to behind masks
            alike=True,
            keeps_prefixes=False,
            shared_out=SharedOut(parts, keeps, uneven_prefix(step, parts)),
            longest=max_length,
        )

    @classmethod
    def agreed(
        cls,
        program: RankProgram,
        size: CacheSize | None,
        communicator: Communicator,
        device: torch.device,
        *,
        rows: int | None,
        step: int,
        kept: WhatIsKept,
    ) -> InRows:
        """A collective, as `Room.agreed`; raises as `Room.require`."""
        wanted = CacheSize(max_batch=rows or DEFAULT_ROWS, memory=_DEFAULT_MEMORY) if size is None else size
        wanted = replace(wanted, max_batch=rows or wanted.max_batch, prefill_step=step)
        room = Room.agreed(program, wanted, communicator, device)
        max_length = wanted.max_length
        if max_length is None:
            max_length = _MOST_TOKENS if room.tokens is None else room.tokens
            if size is None:
                max_length = min(max_length, _MOST_TOKENS)
        room.require(max(1, max_length))
        step = step_of(program, step, max_length)
        return cls(
            program, room, device, rows=wanted.max_batch, max_length=max_length, step=step,
            axes=kept.token_axes, keeps=not kept.gives_up,
        )  # fmt: skip

    def rows_of(self, work: Work) -> int:
        taken = [turn.table[0] for turn in work.turns]
        return max(taken) - min(taken) + 1 if taken else 0

    def run_of(self, work: Work, last: Callable[[int], tuple[int, int]], *, count: int = 0) -> Run:
        """Rows of nobody are those beside the others, whoever has them: they repeat what they have as well."""
        turns = {turn.table[0]: turn for turn in work.turns}
        first = min(turns, default=0)
        stop = max(first + count, max(turns, default=-1) + 1)
        first -= max(0, stop - self.limits.rows)
        numbers = range(first, min(stop, self.limits.rows))
        tokens, starts = [], []
        for row in numbers:
            if row in turns:
                tokens.append(list(turns[row].tokens))
                starts.append(turns[row].start)
            else:
                token, position = last(row)
                tokens.append([token])
                starts.append(position)
        piece = Piece(tokens, starts, tuple(row in turns for row in numbers))
        at = tuple(turn.table[0] - numbers.start for turn in work.turns)
        return Run(work, piece, slice(numbers.start, numbers.stop), at)

    def before(self, run: Run) -> None:
        for turn in run.work.turns:
            row = turn.table[0]
            if turn.source is not None and isinstance(self.cache, ShardedCache):  # other stages remember nothing
                self.cache.take_over(row, *turn.source)
            elif turn.start == 0:
                self.cache.start(slice(row, row + 1))

    def clear(self, blocks: list[int]) -> None:
        """Nothing: the next sequence of a row reads what it has written itself."""


def why_eager(places: Places, program: RankProgram, *, compile: bool, cuda_graph: bool) -> str:
    """Why decode steps are neither compiled nor captured though that was asked for; "": they are, or it was not."""
    wanted = {"compile": compile, "cuda_graph": cuda_graph}
    asked = " and ".join(name for name, is_asked in wanted.items() if is_asked)
    if not asked:
        return ""
    if isinstance(places, InRows):
        return (
            f"{asked}: ranks share out the tokens of a sequence over {places.axes}, and rows of many requests come and "
            "go"
        )
    if not all(state.per_token for state in program.states):
        return f"{asked}: the model keeps states per sequence, and rows that come and go change which those are"
    # what is compiled has one size, which must be no cache's
    if compile and not places.cache.any_length:
        return (
            f"{asked}: attention of single tokens is not the kernel's in all layers, so a compiled step would be as "
            "long as the whole cache"
        )
    return ""


def places_for(
    program: RankProgram,
    size: CacheSize | None,
    communicator: Communicator,
    device: torch.device,
    *,
    rows: int | None,
    block_size: int | None,
) -> Places:
    """A collective: the cache of a rank. size, rows: None for defaults; see `PagedSize`."""
    if size is not None:
        program = held_as(program, size.dtype, communicator, device)
    step = None if size is None else size.prefill_step
    if step is None:
        step = default_step(program, communicator, device, max_batch=1)
    kept = WhatIsKept.agreed(program, communicator, device)
    if kept.token_axes:
        return InRows.agreed(program, size, communicator, device, rows=rows, step=step, kept=kept)
    paged = PagedSize.agreed(program, size, communicator, device, step=step, rows=rows, block_size=block_size)
    why_not = why_not_packed(program, communicator, device)
    return InBlocks(program, paged, device, budget=paged.step, kept=kept, why_not_packed=why_not)


def _order(work: Work) -> list[int]:
    """Turns in the order of their rows: those that are alike lie beside each other, for attention to take together."""
    sizes = [(len(turn.tokens), turn.start) for turn in work.turns]
    return sorted(range(len(sizes)), key=sizes.__getitem__)
