"""Reading shards from files: only the bytes that are needed, several reads at a time.

    reader = Reader(TensorFiles("checkpoint/"))
    reader.load(weights, device)     one tensor per WeightShard
    reader.bytes_read                what that asked the operating system for

A piece is read in strips of a few megabytes: straight into its place where the bytes lie there as they do in the file,
through a buffer of a strip where they are to be cast, rearranged or sent to a device. So memory stays at that of the
shard and a buffer per thread. Bytes come by pread and not through a map, whose pages would count as the process's own.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from partitioner.errors import WeightError
from runtime.progress import Progress
from runtime.rank_program import Piece, WeightShard, at, extents
from runtime.strided import Strided, row_major
from runtime.tensor_files import Entry, TensorFiles

__all__ = ["Reader"]

STRIP_BYTES = 8 << 20
SHORTEST_RUN_BYTES = 4 << 10
"""Shorter runs are read with what lies between them: from a disk, whole pages come anyway."""
THREADS = 4


@dataclass(frozen=True, eq=False)
class _Strip:
    """What one read fills: a part of the local tensor, and where its elements are in the file."""

    entry: Entry
    spot: Strided
    target: Tensor


class Reader:
    """See the module's docstring."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files
        self.bytes_read = 0
        self._lock = threading.Lock()

    def load(self, weights: Sequence[WeightShard], device: torch.device, *, progress: bool = False) -> list[Tensor]:
        """One tensor per weight, put together from its pieces."""
        loaded = [torch.empty(weight.local_shape, dtype=weight.dtype, device=device) for weight in weights]
        strips = [
            strip
            for weight, local in zip(weights, loaded, strict=True)
            for piece in weight.pieces
            for strip in self._strips(weight, piece, local)
        ]
        # in the order of the files, whatever that of the model is
        strips.sort(key=lambda strip: (str(strip.entry.file), strip.entry.start, strip.spot.offset))
        with Progress("loading", sum(strip.target.nbytes for strip in strips), show=progress) as shown:
            self._read_all(strips, shown)
        return loaded

    def _strips(self, weight: WeightShard, piece: Piece, local: Tensor) -> Iterator[_Strip]:
        entry = self.files.entries.get(piece.tensor)
        if entry is None:
            raise WeightError(f"{self.files.folder} holds no tensor {piece.tensor!r}, needed for {weight.name!r}")
        spot = Strided.of(piece, entry.shape)
        if spot is None:
            raise WeightError(
                f"{entry.file}: {piece.tensor!r} of shape {list(entry.shape)} does not hold what {weight.name!r} needs "
                f"of it ({piece}): it is not the checkpoint that was partitioned"
            )
        if 0 in extents(piece.destination):
            return
        size = entry.dtype.itemsize
        for strip in spot.strips(STRIP_BYTES // size, SHORTEST_RUN_BYTES // size):
            yield _Strip(entry, strip, local[at(strip.destination)])

    def _read_all(self, strips: list[_Strip], shown: Progress) -> None:
        opened = {file: os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in {strip.entry.file for strip in strips}}
        try:
            with ThreadPoolExecutor(THREADS, thread_name_prefix="load") as pool:
                running = [pool.submit(self._read, strip, opened, shown) for strip in strips]
                wait(running, return_when=FIRST_EXCEPTION)
                for future in running:
                    future.cancel()
            for future in running:
                if not future.cancelled():
                    future.result()
        finally:
            for descriptor in opened.values():
                os.close(descriptor)

    def _read(self, strip: _Strip, opened: dict[Path, int], shown: Progress) -> None:
        entry, target = strip.entry, strip.target
        plan = strip.spot.plan(SHORTEST_RUN_BYTES // entry.dtype.itemsize)
        in_place = (
            target.device.type == "cpu"
            and target.dtype == entry.dtype
            and target.is_contiguous()
            and plan.elements == target.numel()
            and all(
                extent == 1 or step == own
                for extent, step, own in zip(target.shape, plan.strides, row_major(tuple(target.shape)), strict=True)
            )
        )
        into = target if in_place else torch.empty(plan.elements, dtype=entry.dtype)
        self._fill(into, entry, plan.runs, opened[entry.file])
        if not in_place:
            target.copy_(into.as_strided(target.shape, plan.strides))
        shown.advance(target.nbytes)

    def _fill(self, tensor: Tensor, entry: Entry, runs: list[tuple[int, int]], descriptor: int) -> None:
        """The tensor's memory with these runs, one after the other."""
        size, address, count = entry.dtype.itemsize, tensor.data_ptr(), 0
        for first, length in runs:
            view = memoryview((ctypes.c_char * (length * size)).from_address(address + count)).cast("B")
            position = entry.start + first * size
            while view:
                got = os.preadv(descriptor, [view], position)
                if got == 0:
                    raise WeightError(f"{entry.file} is cut short: it ends within {entry.name!r}")
                view, position = view[got:], position + got
            count += length * size
        with self._lock:
            self.bytes_read += count
