"""Runs of one rank over its cache: pieces of prompts by one program, single tokens by another.

prefill(pieces)   -> logits [B, V/n] of each prompt's last token
decode(piece)     -> the same, one token further: node by node, compiled, or as a captured CUDA graph
run(piece)        -> the same of any piece; `rows`: those of the cache that its sequences own
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.communication.communicator import Communicator
from runtime.execution.executable import Executable
from runtime.execution.profile import Profiler
from runtime.generation.conversation import Piece
from runtime.generation.decode_graphs import Decoder, GraphPool
from runtime.kv_cache.batch import Batch, PagedRows
from runtime.kv_cache.cache import Cache
from runtime.pipeline.head import HeadOfAll
from runtime.program.rank_program import RankProgram

__all__ = ["Loaded", "Steps"]


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

        def bound(loaded: Loaded) -> Executable:
            return Executable(loaded.program, loaded.weights, communicator, device, cache, profiler)

        def head(loaded: Loaded) -> HeadOfAll | None:
            return HeadOfAll.of(loaded.program, loaded.weights, communicator, device, profiler)

        self._prefill = bound(prefill)
        self._decode = self._prefill if decode is prefill else bound(decode)
        self._head = head(prefill)
        self._decode_head = self._head if decode is prefill else head(decode)
        self._decoders: dict[int, Decoder] = {}
        """By the number of sequences."""
        self._pool = GraphPool()

    def prefill(self, pieces: Iterable[Piece]) -> Tensor:
        """The logits [B, V/n] of each prompt's last token."""
        found: Tensor | None = None
        for piece in pieces:
            logits = self.run(piece)
            completes = torch.tensor(piece.completes, device=self._device)
            found = logits if found is None else torch.where(completes[:, None], logits, found)
        assert found is not None
        return found

    def decode(self, piece: Piece) -> Tensor:
        """The logits [B, V/n] after one more token per row."""
        if not self._compile and not self._cuda_graph:
            return self.run(piece, decode=True)
        return self.decoder(len(piece.tokens))([row[0] for row in piece.tokens], piece.starts, piece.active)

    def decoder(self, batch: int) -> Decoder:
        """The steps of `batch` sequences from fixed memory, which captured ones share: one is replayed at a time."""
        if batch not in self._decoders:
            self._decoders[batch] = Decoder(
                self._decode_program,
                self._decode,
                self.cache,
                batch=batch,
                device=self._device,
                compile=self._compile,
                cuda_graph=self._cuda_graph,
                pool=self._pool,
            )
        return self._decoders[batch]

    @property
    def serve_any_cache(self) -> bool:
        """Whether there are steps whose compiled code does not depend on the cache's size."""
        return bool(self._decoders) and self.cache.any_length

    def run(self, piece: Piece, *, decode: bool = False, rows: slice | PagedRows | None = None) -> Tensor:
        """The logits [B, V/n] of each row's last token.

        decode: by the program for single tokens. rows: those of the cache; by default the first.
        """
        logits: Tensor = self.execute(piece, decode=decode, rows=rows)
        return logits[:, 0]

    def sizes(self, piece: Piece) -> dict[str, int]:
        """The named sizes of a run of `piece`."""
        ends = [start + len(row) for start, row in zip(piece.starts, piece.tokens, strict=True)]
        return {
            "batch": 1 if piece.packed else len(piece.tokens),
            "sequence": (sum if piece.packed else max)(map(len, piece.tokens)),
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
        batch, values = self._inputs(piece, decode=decode, least=least)
        self.cache.begin(batch, rows=rows, decode=decode)
        execute = self._decode if decode else self._prefill
        return execute([*values, *received], like="packed" if piece.packed else like)

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

    @property
    def shares_head(self) -> bool:
        """Whether all stages share out the vocabulary head."""
        return self._head is not None

    def _inputs(self, piece: Piece, *, decode: bool, least: int = 0) -> tuple[Batch, list[Tensor]]:
        """A run of `piece` as the cache is told of it, and the inputs of its program."""
        counts = [len(row) for row in piece.tokens]
        if piece.packed:
            rows = zip(piece.starts, counts, strict=True)
            ids = torch.tensor([[token for row in piece.tokens for token in row]], device=self._device)
            positions = torch.tensor([[at for start, count in rows for at in range(start, start + count)]])
            positions = positions.to(self._device)
            ends = zip(itertools.accumulate(counts), piece.completes, strict=True)
            last = torch.tensor([end - 1 for end, is_told in ends if is_told] or [sum(counts) - 1], device=self._device)
        else:
            size = max(*counts, least)
            ids = torch.tensor([row + row[-1:] * (size - len(row)) for row in piece.tokens], device=self._device)
            last = torch.tensor(counts, device=self._device) - 1
            offsets = torch.arange(size, device=self._device).minimum(last[:, None])
            positions = torch.tensor(piece.starts, device=self._device)[:, None] + offsets
        batch = Batch(positions, tuple(piece.starts), tuple(counts), piece.active, piece.packed)
        program = self._decode_program if decode else self._program
        known = {
            "input_ids": ids,
            "position_ids": positions,
            "last": last,
            "active": torch.tensor(piece.active, device=self._device),
            "slots": torch.arange(max(batch.end + 1, self._least_slots), device=self._device),
        }
        for wanted in program.inputs:
            if wanted.name not in known:
                raise InputError(f"generation knows nothing to give the input {wanted.name!r} of this model")
        return batch, [known[wanted.name] for wanted in program.inputs]

    def release(self) -> None:
        """Gives back what captured steps hold, and the cache's memory; what is compiled stays."""
        for decoder in self._decoders.values():
            decoder.release()
        self._pool.renew()
        self.cache.drop()
