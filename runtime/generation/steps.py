"""Runs of one rank over its cache: pieces of prompts by one program, single tokens by another.

prefill(pieces)   -> logits [B, V/n] of each prompt's last token
decode(piece)     -> the same, one token further: node by node, compiled, or as a captured CUDA graph
run(piece)        -> the same of any piece; `rows`: those of the cache that its sequences own
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.communication.communicator import Communicator
from runtime.execution.cuda_graphs import GraphPool, captured, compiled_step
from runtime.execution.executable import Executable
from runtime.execution.profile import Profiler
from runtime.execution.prompts.agreed_ways import AgreedWays, row_dims
from runtime.execution.prompts.captured_pieces import CapturedPieces, Made, Runnable
from runtime.execution.prompts.inputs import filled_up, inputs_of, on_device
from runtime.execution.prompts.packed_pieces import PackedPieces, Room
from runtime.execution.prompts.piece import Piece, halves_of, last_of, places
from runtime.generation.decode_graphs.decoder import Decoder
from runtime.generation.decode_graphs.stage_decoder import StageDecoder
from runtime.kv_cache.batch import Batch, PagedRows
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.cache_size import can_spare
from runtime.kv_cache.paged_cache import PagedCache
from runtime.ops.kernels.decode.few_rows import MOST_ROWS
from runtime.ops.kernels.triton_needs import replayed
from runtime.pipeline.head import HeadOfAll
from runtime.program.rank_program import RankProgram

__all__ = ["Loaded", "Steps"]


TURNS_ON = frozenset({"cuda"})
TURNS_FROM: int | None = None
"""Tokens of a piece from which on its halves take turns; None: as many as the program says."""
CAPTURED_ON = frozenset({"cuda"})
"""Devices on which pieces of prompts have places for more tokens, and are captured when they come again."""
CAPTURED_TURNS_FROM = 3072
"""Tokens of a captured piece from which on its halves take turns. Of an 8B decoder on two H200, halves and the whole
took 30.7 and 30.8 ms for 2,048 tokens, 56.2 and 60.6 for 4,096."""
_WHOLE_TO_TURNS = 3
"""By how much a whole piece may be shorter until a GPU waits for its host, which then launches one run instead of two.
One H200 takes 24.7 instead of 25.3 ms for 1,024 tokens if they are captured, two take 30.8 instead of 33.8 for 2,048.
"""


@dataclass(frozen=True)
class Loaded:
    """A program with its weights, in the order of `program.weights`."""

    program: RankProgram
    weights: Sequence[Tensor]


class Steps:
    """The programs for prompts and for single tokens, bound to one cache.

    compile, cuda_graph: whether steps of single tokens are compiled, or captured.
    """

    def __init__(
        self,
        prefill: Loaded,
        decode: Loaded,
        cache: Cache,
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
        *,
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        self.cache = cache
        self._program, self._decode_program = prefill.program, decode.program
        self._device = device
        self._compile, self._cuda_graph = compile, cuda_graph

        def bound(loaded: Loaded, *, captured: bool = False) -> Executable:
            return Executable(loaded.program, loaded.weights, communicator, device, cache, profiler, captured=captured)

        def head(loaded: Loaded) -> HeadOfAll | None:
            return HeadOfAll.of(loaded.program, loaded.weights, communicator, device, profiler)

        self._prefill = bound(prefill)
        is_shared = decode is prefill and not cuda_graph
        self._decode = self._prefill if is_shared else bound(decode, captured=cuda_graph)
        self._head = head(prefill)
        self._decode_head = self._head if decode is prefill else head(decode)
        self._decoders: dict[tuple[int, int | None, int], Decoder] = {}
        """By the number of sequences, the first of their rows (None: those that the cache has been told), and the group
        of these that the cache has been told of.
        """
        self._compiled: dict[tuple[int, int | None], Callable[..., Any]] = {}
        """What runs them; where one does for all rows, by the number only."""
        self._pool = GraphPool()
        program = prefill.program
        names = [wanted.name for wanted in program.inputs]
        self._ways = ways = AgreedWays.of(
            program, cache, communicator, device, shares_head=self._head is not None,
            may_halve=device.type in TURNS_ON, may_capture=device.type in CAPTURED_ON,
        )  # fmt: skip
        self._turns_from, self.takes_turns = ways.turns_from, ways.takes_turns
        # a token that comes later must find its slot as if nobody had been there
        roomy = "last" in names and "slots" not in names
        self._takes_more = roomy and all(state.sees is None for state in program.states)
        self._pool_of_pieces = GraphPool()
        self._communicator, self._has_room = communicator, True
        self.look_for_room()
        self._pieces = CapturedPieces(self._capture)
        self._packed: PackedPieces | None = None
        yields = row_dims(program)
        if ways.packs_steadily and isinstance(cache, PagedCache) and yields is not None:
            self._packed = PackedPieces(self._prefill, cache, self._pieces, yields=yields)

    def look_for_room(self) -> None:
        """For captured pieces, beside the cache as it is; a collective on GPUs, where there may be some."""
        if (self._ways.is_steady or self._ways.packs_steadily) and self._device.type in CAPTURED_ON:
            rows = self._turns_from if self.takes_turns else self._turns_from // _WHOLE_TO_TURNS
            most = min(rows, self.cache.max_batch * self.cache.step)  # nothing larger comes
            self._has_room = can_spare(self._program, self._communicator, self._device, rows=most)

    def prefill(self, pieces: Iterable[Piece]) -> Tensor:
        """The logits [B, V/n] of each prompt's last token."""
        found: Tensor | None = None
        for piece in pieces:
            logits = self.run(piece)
            completes = torch.tensor(piece.completes, device=self._device)
            found = logits if found is None else torch.where(completes[:, None], logits, found)
        assert found is not None
        return found

    def decode(self, piece: Piece, received: Sequence[Tensor] = (), *, rows: slice | PagedRows | None = None) -> Any:
        """The logits [B, V/n] after one more token per row, or what the rank's stage hands on.

        received: what comes from the stage before. What is compiled or captured is valid until the next call.
        """
        if not self.decodes_from_fixed_memory:
            made = self.execute(piece, received, decode=True, rows=rows)
            return made if isinstance(made, tuple) else made.select(1, 0)
        assert not isinstance(rows, PagedRows)
        decoder = self.decoder(len(piece.tokens), rows)
        return decoder([row[0] for row in piece.tokens], piece.starts, piece.active, received)

    @property
    def decodes_from_fixed_memory(self) -> bool:
        """Whether steps of single tokens are compiled or captured."""
        return self._compile or self._cuda_graph

    def decoder(self, batch: int, rows: slice | None = None, *, group: int = 0) -> Decoder:
        """The steps of `batch` sequences from fixed memory, which captured ones share: one is replayed at a time.

        On a rank of a stage, a `StageDecoder`.
        """
        first = None if rows is None else rows.start
        key = batch, first, group
        if key not in self._decoders:
            made = Decoder if self._decode_program.stage is None else StageDecoder
            self._decoders[key] = made(
                self._decode_program,
                self._decode,
                self.cache,
                batch=batch,
                rows=rows,
                device=self._device,
                compiled=self._compiled_step(batch, first) if self._compile and not self._has_kernels(batch) else None,
                cuda_graph=self._cuda_graph,
                pool=self._pool,
                head=self._decode_head,
                group=group,
            )
        return self._decoders[key]

    def _has_kernels(self, batch: int) -> bool:
        """Whether kernels of ours do what a compiler would do, and better: in captured steps of few rows."""
        return self._cuda_graph and batch <= MOST_ROWS and self._decode.is_by_own_kernels

    def _compiled_step(self, batch: int, first: int | None) -> Callable[..., Any]:
        key = batch, None if self.cache.any_rows else first
        if key not in self._compiled:
            self._compiled[key] = compiled_step(self._decode_program, self._decode, self.cache, self._device)
        return self._compiled[key]

    @property
    def serve_any_cache(self) -> bool:
        """Whether nothing that is bound to the cache depends on its size: of what is compiled, something may."""
        return not self.decodes_from_fixed_memory or (bool(self._decoders) and self.cache.any_length)

    def run(self, piece: Piece, *, decode: bool = False, rows: slice | PagedRows | None = None) -> Tensor:
        """The logits [B, V/n] of each row's last token.

        decode: by the program for single tokens. rows: those of the cache; by default the first.
        """
        logits: Tensor = self.execute(piece, decode=decode, rows=rows)
        return logits[:, 0]

    def sizes(self, piece: Piece, *, least: int = 1) -> dict[str, int]:
        """The named sizes of a run of `piece`; least: as `execute` has it."""
        ends = [start + len(row) for start, row in zip(piece.starts, piece.tokens, strict=True)]
        return {
            "batch": 1 if piece.packed else len(piece.tokens),
            "sequence": self._packed_tokens(piece) if piece.packed else max(least, *map(len, piece.tokens)),
            "slots": max(max(ends) + 1, self._least_slots),
        }

    @property
    def _least_slots(self) -> int:
        # a graph for single steps may decide by whether there are slots besides those of its tokens
        return max(p.limits.get("slots", (1, None))[0] for p in (self._program, self._decode_program))

    def execute(
        self,
        piece: Piece,
        received: Sequence[Tensor] = (),
        *,
        decode: bool = False,
        rows: slice | PagedRows | None = None,
        least: int = 1,
        like: Hashable = None,
    ) -> Any:
        """What the rank's graph yields: logits [B, 1, V/n], or what its stage hands on; of a packed piece, logits of
        the rows that it completes, or of its last token where it completes none.

        received: what comes from the stage before. least: how many tokens each row is filled up to, if not more. like:
        as `Executable` has it.
        """
        if not (decode or received or least > 1 or like is not None or piece.packed):
            return self._execute_piece(piece, rows)
        if piece.packed and isinstance(rows, PagedRows) and self._packed is not None and self._packed_room(piece):
            return self._packed(piece, rows, received)
        batch, values = self._inputs(piece, decode=decode, least=least)
        self.cache.begin(batch, rows=rows, decode=decode)
        execute = self._decode if decode else self._prefill
        return execute([*values, *received], like="packed" if piece.packed else like)

    def _packed_room(self, piece: Piece) -> Room | None:
        """Of a packed piece that may be captured, as `PackedPieces.room_of` has it."""
        keeps_busy = sum(map(len, piece.tokens)) >= self.packs_below
        if self._packed is None or keeps_busy or not self._comes_again(piece, self._ways.packs_steadily):
            return None
        return self._packed.room_of(piece)

    def _packed_tokens(self, piece: Piece) -> int:
        """How many a run of a packed piece has."""
        room = self._packed_room(piece)
        return sum(map(len, piece.tokens)) if room is None else room.rows + room.tokens

    @property
    def packs_below(self) -> int:
        """Tokens of a step of prompts amid single tokens below which it is captured; alike on all ranks."""
        return math.ceil(self._turns_from / _WHOLE_TO_TURNS) if self._packed is not None and self._has_room else 0

    def _execute_piece(self, piece: Piece, rows: slice | PagedRows | None) -> Any:
        """The logits of a piece of prompts: whole or in two halves, node by node or captured."""
        tokens = len(piece.tokens) * max(map(len, piece.tokens))
        may = self.takes_turns and tokens > 1 and all(piece.active)
        now = may and tokens >= (self._turns_from if TURNS_FROM is None else TURNS_FROM)
        later = now or (may and TURNS_FROM is None and tokens >= CAPTURED_TURNS_FROM)
        if isinstance(rows, PagedRows) or not self._comes_again(piece, self._ways.is_steady):
            return self._ready(piece, rows, in_turns=now).run()
        filled, last = self._filled(piece, in_turns=later)
        if tokens >= (self._turns_from if later else self._turns_from / _WHOLE_TO_TURNS):  # it keeps a GPU busy
            return self._ready(filled, rows, in_turns=now, last=last).run()
        counts = tuple(map(len, filled.tokens))
        return self._pieces(
            (later, last is None, tuple(piece.starts), counts, None if rows is None else (rows.start, rows.stop)),
            place=tuple((buffer.data_ptr(), buffer.shape) for buffer in self.cache.buffers.values()),
            first=lambda: self._ready(filled, rows, in_turns=now, last=last),
            again=lambda: self._ready(filled, rows, in_turns=later, last=last, captured=True),
            varying=lambda: self._varying(filled.parts(in_turns=later), last),
        )

    def _comes_again(self, piece: Piece, is_steady: bool) -> bool:
        """Whether what is prepared for its size may serve others."""
        return (
            self._device.type in CAPTURED_ON
            and is_steady
            and self._has_room
            and all(piece.active)
            and not self._prefill.is_observed
        )

    def _filled(self, piece: Piece, *, in_turns: bool) -> tuple[Piece, list[int] | None]:
        """With as many tokens more as there are places, and which ones are the last; None: nothing comes of that."""
        counts = list(map(len, piece.tokens))
        longest, room = max(counts), self.cache.max_length - max(piece.starts)
        size = min(places(longest), self.cache.step, room)
        if in_turns and len(counts) == 1 and longest <= size // 2:  # its last token is one of the second half
            size = longest
        if not self._takes_more or size < longest:
            return piece, None
        return piece.filled(size), [count - 1 for count in counts]

    def _varying(self, parts: Sequence[Piece], last: list[int] | None) -> list[Tensor]:
        """The tokens of each part, and which ones are the last, where these are not all that a row has."""
        ids = [self._ids(part, max(map(len, part.tokens))) for part in parts]
        return ids if last is None else [*ids, *(on_device(ends, self._device) for ends in last_of(parts, last))]

    def _ready(
        self,
        piece: Piece,
        rows: slice | PagedRows | None,
        *,
        in_turns: bool,
        last: list[int] | None = None,
        captured: bool = False,
    ) -> Runnable:
        """last: which of its tokens is the last of each row; None: all that it has are its own. captured: its runs are
        to be captured.
        """
        cache, execute = self.cache, self._prefill
        parts, joins = piece.parts(in_turns=in_turns), len(piece.tokens) > 1
        of_parts = halves_of(rows, len(piece.tokens)) if in_turns else [rows]
        runs = [(*self._inputs(part, decode=False), of) for part, of in zip(parts, of_parts, strict=True)]
        several = [values for _, values, _ in runs]
        names = [wanted.name for wanted in self._program.inputs]
        varying = [values[names.index("input_ids")] for values in several] if self._ways.is_steady else []
        if last is not None:
            for values, ends in zip(several, last_of(parts, last), strict=True):
                values[names.index("last")] = on_device(ends, self._device)
                varying.append(values[names.index("last")])

        def begin() -> list[dict[str, Any]]:
            under_way = []
            for batch, _, of in runs:
                cache.begin(batch, rows=of)
                under_way.append(cache.under_way())
            return under_way

        def take_turns(run: Callable[..., list[Any]]) -> Tensor:
            under_way, current = begin(), len(runs) - 1

            def resume(number: int) -> None:
                nonlocal current
                under_way[current] = cache.under_way()
                cache.resume(under_way[number])
                current = number

            with replayed() if captured else nullcontext():
                found = run(several, resume)
            return torch.cat(found) if joins else found[-1]

        def whole(run: Callable[..., Tensor]) -> Tensor:
            begin()
            with replayed() if captured else nullcontext():
                return run(several[0])

        if in_turns:
            ways = execute.in_turns, execute.bare_in_turns
            return Runnable(varying, begin, *(functools.partial(take_turns, way) for way in ways))
        return Runnable(varying, begin, lambda: whole(execute), lambda: whole(lambda values: execute.function(*values)))

    def _capture(self, run: Callable[[], Made]) -> tuple[Any, Made]:
        # the ranks have compared the run before: what they tell each other for that comes from the host
        self._communicator.begin_run(new_shapes=False)
        return captured(run, self._pool_of_pieces)

    def head(self, piece: Piece, made: Sequence[Tensor] | None, *, decode: bool = False) -> Tensor:
        """Logits [B, 1, V/n] of a head that all stages share out, whose ranks all call this for the same pieces.

        made: what the last stage's graph has made of the piece; None on the others.
        """
        head = self._decode_head if decode else self._head
        assert head is not None
        sizes = self.sizes(piece)
        if piece.packed and head.takes_last_tokens:
            sizes["batch"] = max(1, sum(piece.completes))
        logits: Tensor = head(self._inputs(piece, decode=decode)[1], sizes, made)
        return logits

    def _ids(self, piece: Piece, size: int) -> Tensor:
        return on_device(filled_up(piece, size), self._device)

    @property
    def shares_head(self) -> bool:
        """Whether all stages share out the vocabulary head."""
        return self._head is not None

    def _inputs(self, piece: Piece, *, decode: bool, least: int = 0) -> tuple[Batch, list[Tensor]]:
        program = self._decode_program if decode else self._program
        return inputs_of(piece, program, self._device, least=least, least_slots=self._least_slots)

    def release(self) -> None:
        """Gives back what captured steps hold, and the cache's memory; what is compiled stays."""
        for decoder in self._decoders.values():
            decoder.release()
        self._pool.renew()
        self._pieces.release()
        self._pool_of_pieces.renew()
        self.cache.drop()
