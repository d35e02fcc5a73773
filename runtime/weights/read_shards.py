"""Reading shards from files: only the bytes that are needed, several reads at a time.

    reader = Reader(TensorFiles("checkpoint/"))
    reader.load(weights, device)     one tensor per WeightShard
    reader.bytes_read                what that asked the operating system for

A piece is read in strips of a few megabytes: straight into its place where the bytes lie there as they do in the file,
through a buffer of a strip where they are to be cast, rearranged or sent to a device. So memory stays at that of the
shard and a buffer per thread.

    Reader(files, mapped=True)       on the CPU: rows and columns of a matrix are mapped where they lie, not read

Mapped weights cost no memory of the process's own and no time before they are used, and ranks of a machine share them.
But then the files must stay as they are while the engine lives: who overwrites them changes the weights, or ends the
process. So it is for the user to choose.

    Reader(files, checked=False)     weights are not compared with their digests, where they have such
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import math
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from partitioner.errors import WeightError
from runtime.ops.kernels.stored.codes import pack_nibbles
from runtime.program.shards import Block, Piece, WeightShard, at, extents
from runtime.weights.progress import Progress
from runtime.weights.quantized.formats import FORMATS, expand
from runtime.weights.quantized.packed import Packed, Raw
from runtime.weights.safetensors_files import Entry, TensorFiles
from runtime.weights.strided_reads import Strided, row_major

__all__ = ["Reader", "digest_of"]

STRIP_BYTES = 4 << 20
SHORTEST_RUN_BYTES = 2 << 10
"""Shorter runs, of less than half a page, are read with what lies between them: a disk reads whole pages anyway."""
SHORTEST_PACKED_RUN_BYTES = 1 << 8
"""Of quantised tensors, whose rows are a half or a quarter as long."""
PACKED_ELEMENTS = 1 << 20
"""Of a quantised tensor at a time: some 20 MB of what they are on the way to numbers."""
THREADS = 4
STAGE_BYTES = 1 << 30
HUGE_BYTES = 4 << 20
MOSTLY_NEEDED = 2
"""Of so many bytes one is needed: all of them may be read ahead."""


@dataclass(frozen=True, eq=False)
class _Strip:
    """What one read fills: a part of the local tensor, and where its elements are in the file."""

    entry: Entry
    spot: Strided
    target: Tensor

    @property
    def files(self) -> set[Path]:
        return {self.entry.file}

    @property
    def order(self) -> tuple[str, int, int]:
        return str(self.entry.file), self.entry.start, self.spot.offset


@dataclass(frozen=True, eq=False)
class _PackedStrip:
    """The same of a quantised tensor: `parts` are the entries that hold it, by role."""

    packed: Packed
    parts: Mapping[str, Entry]
    spot: Strided
    target: Tensor
    held: str | None

    @property
    def files(self) -> set[Path]:
        return {entry.file for entry in self.parts.values()}

    @property
    def order(self) -> tuple[str, int, int]:
        codes = self.parts["codes"]
        return str(codes.file), codes.start, self.spot.offset


class Reader:
    """See the module's docstring."""

    def __init__(self, files: TensorFiles, *, mapped: bool = False, checked: bool = True) -> None:
        self.files = files
        self.mapped = mapped
        self.checked = checked
        """Whether weights must have the digests that are known of them: all of their bytes are read for that."""
        self.bytes_read = 0
        """Of the files; what is mapped is counted as if it were read."""
        self._lock = threading.Lock()
        self._maps: dict[Path, mmap.mmap] = {}

    def load(self, weights: Sequence[WeightShard], device: torch.device, *, progress: bool = False) -> list[Tensor]:
        """One tensor per weight, put together from its pieces; those with a digest must have it, if `checked`."""
        for weight in weights:
            for piece in weight.pieces if weight.digest else ():
                self._find(weight, piece)  # before memory is set aside: a description may be hostile
        if not self.checked:
            weights = [dataclasses.replace(weight, digest=None) for weight in weights]
        with Progress("loading", sum(weight.bytes for weight in weights), show=progress) as shown:
            return [tensor for some in _staged(weights, device) for tensor in self._load(some, device, shown)]

    def _load(self, weights: Sequence[WeightShard], device: torch.device, shown: Progress) -> list[Tensor]:
        found = [self._map(weight) if self.mapped and device.type == "cpu" else None for weight in weights]
        loaded = [
            tensor if tensor is not None else _empty(weight, torch.device("cpu") if weight.digest else device)
            for weight, tensor in zip(weights, found, strict=True)
        ]
        for weight, tensor in zip(weights, loaded, strict=True):
            if weight.held == "codes":
                tensor.zero_()
        strips: list[_Strip | _PackedStrip] = [
            strip
            for weight, local, done in zip(weights, loaded, found, strict=True)
            if done is None
            for piece in weight.pieces
            for strip in self._strips(weight, piece, local)
        ]
        # in the order of the files, whatever that of the model is
        strips.sort(key=lambda strip: strip.order)
        self._read_all(strips, shown)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="check") as pool:
            for _ in pool.map(_require_digest, weights, loaded):
                pass
        return [tensor.to(device) for tensor in loaded]

    def _map(self, weight: WeightShard) -> Tensor | None:
        """The weight where it lies in a file, if it lies there in its own dtype: in one run, or a matrix's columns."""
        shape = weight.local_shape
        if len(weight.pieces) != 1 or 0 in shape:
            return None
        entry, spot = self._find(weight, weight.pieces[0])
        if isinstance(entry, Packed) or entry.dtype != weight.dtype or entry.start % entry.dtype.itemsize:
            return None
        if _in_order(spot.strides, shape):
            found = self._where_it_lies(entry, spot, row_major(shape))
        # products take rows at larger steps as they are; in float16 one row would take three times as long
        elif len(shape) == 2 and spot.strides[1] == 1 and spot.strides[0] > shape[1] and weight.dtype != torch.float16:
            found = self._where_it_lies(entry, spot, spot.strides)
        else:
            return None
        first = entry.start + spot.offset * entry.dtype.itemsize
        begin, end = first // mmap.PAGESIZE * mmap.PAGESIZE, first + _span(shape, found.stride()) * found.itemsize
        if end - begin <= MOSTLY_NEEDED * weight.bytes + mmap.PAGESIZE:
            self._mapped_file(entry.file).madvise(mmap.MADV_WILLNEED, begin, end - begin)  # the disk may begin
        return found

    def _mapped_file(self, file: Path) -> mmap.mmap:
        with self._lock:
            if file not in self._maps:
                descriptor = self.files.open(file)
                # private: what is written into a weight stays out of the file
                protection = mmap.PROT_READ | mmap.PROT_WRITE
                self._maps[file] = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=protection)
                os.close(descriptor)
            return self._maps[file]

    def _find(self, weight: WeightShard, piece: Piece) -> tuple[Entry | Packed, Strided]:
        packed = self.files.packed.get(piece.tensor) if weight.held != "parts" else None
        entry = packed or self.files.entries.get(piece.tensor)
        if entry is None:
            raise WeightError(f"{self.files.folder} holds no tensor {piece.tensor!r}, needed for {weight.name!r}")
        spot = Strided.of(piece, entry.shape)
        if isinstance(entry, Packed) and not _can_be_held(weight, piece, entry):
            spot = None
        if spot is None:
            raise WeightError(
                f"{self.files.folder}: {piece.tensor!r} of shape {list(entry.shape)} does not hold what "
                f"{weight.name!r} needs of it ({piece}): it is not the checkpoint that was partitioned"
            )
        return entry, spot

    def _strips(self, weight: WeightShard, piece: Piece, local: Tensor) -> Iterator[_Strip | _PackedStrip]:
        entry, spot = self._find(weight, piece)
        if 0 in extents(piece.destination):
            return
        if isinstance(entry, Packed):
            parts = {role: self.files.entries[name] for role, name in entry.parts.items()}
            if weight.held == "zeros":
                yield _PackedStrip(entry, parts, Strided(piece.source, 0, ()), local[at(piece.destination)], "zeros")
                return
            along_rows = not FORMATS[entry.format].turned
            for strip in spot.strips(PACKED_ELEMENTS, 1, along_rows=along_rows):
                target = local[at(strip.destination)] if weight.held is None else _of_bytes(local, strip.destination)
                yield _PackedStrip(entry, parts, strip, target, weight.held)
            return
        size = entry.dtype.itemsize
        for strip in spot.strips(STRIP_BYTES // size, _shortest_run(entry)):
            yield _Strip(entry, strip, local[at(strip.destination)])

    def _read_all(self, strips: list[_Strip | _PackedStrip], shown: Progress) -> None:
        opened: dict[Path, int] = {}
        try:
            for file in {file for strip in strips for file in strip.files}:
                opened[file] = self.files.open(file)
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

    def _read(self, strip: _Strip | _PackedStrip, opened: dict[Path, int], shown: Progress) -> None:
        if isinstance(strip, _PackedStrip):
            self._read_packed(strip, functools.partial(self._raw, strip.parts, opened))
            shown.advance(strip.target.nbytes)
            return
        entry, target = strip.entry, strip.target
        if self.mapped and entry.start % entry.dtype.itemsize == 0:
            target.copy_(self._where_it_lies(entry, strip.spot, strip.spot.strides))
            shown.advance(target.nbytes)
            return
        plan = strip.spot.plan(_shortest_run(entry))
        in_place = (
            target.device.type == "cpu"
            and target.dtype == entry.dtype
            and target.is_contiguous()
            and plan.elements == target.numel()
            and _in_order(plan.strides, tuple(target.shape))
        )
        into = target if in_place else torch.empty(plan.elements, dtype=entry.dtype)
        self._fill(into, entry, plan.runs, opened[entry.file])
        if not in_place:
            target.copy_(into.as_strided(target.shape, plan.strides))
        shown.advance(target.nbytes)

    def _read_packed(self, strip: _PackedStrip, raw: Raw) -> None:
        packed, target, form = strip.packed, strip.target, FORMATS[strip.packed.format]
        if strip.held == "zeros":
            assert form.zeros is not None
            target.copy_(form.zeros(packed, raw, strip.spot.destination))
            return
        block, first, strides = strip.spot.box(packed.shape)
        if strip.held is None:
            found = expand(packed, raw, block, target.dtype).contiguous()
            target.copy_(found.as_strided(target.shape, strides, first))
            return
        codes = form.codes(packed, raw, block).contiguous().as_strided(extents(strip.spot.destination), strides, first)
        if strip.spot.destination[-1][0] % 2:  # begins within a byte
            codes = torch.nn.functional.pad(codes, (1, 0))
        with self._lock:  # two strips may meet in a byte
            target |= pack_nibbles(codes).to(target.device)

    def _raw(self, parts: Mapping[str, Entry], opened: Mapping[Path, int], role: str, block: Block) -> Tensor:
        """A block of a part of a quantised tensor, as it is stored, which may be without its last dims of 1."""
        entry = parts[role]
        source = block[: len(entry.shape)]
        spot = Strided.of(Piece(entry.name, source, source), entry.shape)
        assert spot is not None, f"{block} of {entry.name!r} {list(entry.shape)}"
        plan = spot.plan(SHORTEST_PACKED_RUN_BYTES // entry.dtype.itemsize)
        into = torch.empty(plan.elements, dtype=entry.dtype)
        if into.numel():
            self._fill(into, entry, plan.runs, opened[entry.file])
        return into.as_strided(extents(source), plan.strides).reshape(extents(block))

    def _where_it_lies(self, entry: Entry, spot: Strided, strides: tuple[int, ...]) -> Tensor:
        """The elements of `spot` in the mapped file."""
        shape, size = extents(spot.destination), entry.dtype.itemsize
        with_gaps = torch.frombuffer(
            self._mapped_file(entry.file),
            dtype=entry.dtype,
            count=_span(shape, strides),
            offset=entry.start + spot.offset * size,
        )
        with self._lock:
            self.bytes_read += math.prod(shape) * size
        return with_gaps.as_strided(shape, strides)

    def _fill(self, tensor: Tensor, entry: Entry, runs: list[tuple[int, int]], descriptor: int) -> None:
        """The tensor's memory with these runs, one after the other."""
        size, count = entry.dtype.itemsize, 0
        if sys.platform == "linux":
            # threads that take turns at one file look like no sequence, so that nothing would be read ahead
            first, span = runs[0][0], sum(runs[-1]) - runs[0][0]
            if span <= MOSTLY_NEEDED * tensor.numel():
                os.posix_fadvise(descriptor, entry.start + first * size, span * size, os.POSIX_FADV_WILLNEED)
        whole = memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
        for first, length in runs:
            view, position = whole[count : count + length * size], entry.start + first * size
            count += length * size
            while (got := os.preadv(descriptor, [view], position)) < len(view):
                if got == 0:
                    raise WeightError(f"{entry.file} is cut short: it ends within {entry.name!r}")
                view, position = view[got:], position + got
        with self._lock:
            self.bytes_read += count


def _shortest_run(entry: Entry) -> int:
    """In elements."""
    return SHORTEST_PACKED_RUN_BYTES if entry.dtype.itemsize == 1 else SHORTEST_RUN_BYTES // entry.dtype.itemsize


def _can_be_held(weight: WeightShard, piece: Piece, packed: Packed) -> bool:
    """Whether a quantised tensor has what a weight, whose description may be hostile, wants of it."""
    form = FORMATS[packed.format]
    if weight.held == "zeros":
        inside = all(stop <= size for (_, stop), size in zip(piece.source, packed.grid, strict=True))
        return inside and form.zeros is not None and piece.strides is None
    if weight.held == "codes":
        return form.code != "float8" and weight.dtype == torch.uint8 and len(piece.destination) > 0
    return weight.dtype.is_floating_point


def _of_bytes(local: Tensor, block: Block) -> Tensor:
    """The bytes of a block of codes, two of which are in a byte of the last dim."""
    *outer, (start, stop) = block
    return local[at((*outer, (start // 2, -(-stop // 2))))]


def _empty(weight: WeightShard, device: torch.device) -> Tensor:
    """Memory for a weight; on a CPU in huge pages where there are such: to be given small ones takes twice as long as
    to fill them.
    """
    if device.type != "cpu" or sys.platform != "linux" or weight.bytes < HUGE_BYTES:
        return torch.empty(weight.local_shape, dtype=weight.dtype, device=device)
    try:
        memory = mmap.mmap(-1, weight.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):  # torch says how much there is not
        return torch.empty(weight.local_shape, dtype=weight.dtype)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=weight.dtype).view(weight.local_shape)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """From the first element to the last."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))


def _in_order(strides: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether elements at these steps are those of a contiguous tensor."""
    return all(n == 1 or step == own for n, step, own in zip(shape, strides, row_major(shape), strict=True))


def _staged(weights: Sequence[WeightShard], device: torch.device) -> list[list[WeightShard]]:
    """Those that wait on the host until they are checked go to a device some at a time."""
    if device.type == "cpu" or not any(weight.digest for weight in weights):
        return [list(weights)]
    stages: list[list[WeightShard]] = [[]]
    for weight in weights:
        if stages[-1] and sum(other.bytes for other in stages[-1]) + weight.bytes > STAGE_BYTES:
            stages.append([])
        stages[-1].append(weight)
    return stages


def _require_digest(weight: WeightShard, tensor: Tensor) -> None:
    if weight.digest is not None and (found := digest_of(tensor)) != weight.digest:
        raise WeightError(
            f"weight {weight.name!r} is damaged or was altered: the SHA-256 of its bytes is {found}, and recorded is "
            f"{weight.digest}"
        )


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, row-major; hashing lets other threads run."""
    flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()  # type: ignore[arg-type]
