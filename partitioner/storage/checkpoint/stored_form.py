"""A weight that is held as it is stored: which shards of codes and scales a rank holds of it.

    "q_proj.weight" [N, K]   ->   "q_proj.weight.codes", ".scales", ".zeros" where there are such, ".rows", ".columns"

A weight can be held so if it consists of quantised tensors of one kind, whose inputs are its inputs, all of them and in
order: then each of its rows is a row of one of them. Experts that were stacked and projections that were fused are so;
what was divided or rearranged along the inputs is not, and is expanded. What the rows and columns of the result mean is
said in `runtime.ops.kernels.stored.stored_linear`.

The scales of all tensors of a weight, one tensor after the other, are one table. Those of a rank are rows and columns
of it, and say which, so that they can be put together again from several ranks' parts.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from partitioner.sharding.index_set import IndexSet
from partitioner.storage.checkpoint.strided_windows import Moved, Window, permute, piece
from runtime.program.shards import Block, CodesOf, Piece, WeightShard
from runtime.weights.quantized.formats import FORMATS
from runtime.weights.quantized.packed import Packed
from runtime.weights.safetensors_files import TensorFiles
from runtime.weights.strided_reads import Strided, row_major

__all__ = ["StoredForm", "constants", "inputs_last"]

_MOST_DIMS = 3


@dataclass(frozen=True)
class StoredForm:
    """moved: the weight with its inputs last. example: one of the tensors that it consists of. turned: whether the
    weight itself has its inputs before its outputs.
    """

    moved: Moved
    files: TensorFiles
    example: Packed
    turned: bool

    @classmethod
    def of(cls, moved: Moved, files: TensorFiles) -> StoredForm | None:
        """None where the weight cannot be held so."""
        names = {window.tensor for window in moved.windows}
        if not names or not names <= files.packed.keys() or not 2 <= len(moved.shape) <= _MOST_DIMS:
            return None
        tensors = [files.packed[name] for name in names]
        first = tensors[0]
        alike = {
            (t.format, t.block[1], t.computed_in, t.shape[-1], "zeros" in t.parts, t.groups is None) for t in tensors
        }
        types = {files.entries[t.parts[role]].dtype for t in tensors for role in ("codes", "scales")}
        if len(alike) > 1 or len(types) > 2 or (first.groups is not None and len(tensors) > 1):
            return None
        for inputs in (len(moved.shape) - 1, len(moved.shape) - 2):
            order = [*(dim for dim in range(len(moved.shape)) if dim != inputs), inputs]
            held = permute(moved, order)
            if all(_has_rows(window, files.packed[window.tensor]) for window in held.windows):
                return cls(held, files, first, inputs != len(moved.shape) - 1)
        return None

    @property
    def code(self) -> str:
        return FORMATS[self.example.format].code

    @property
    def computed_in(self) -> torch.dtype:
        return self.example.computed_in

    @property
    def has_zeros(self) -> bool:
        return "zeros" in self.example.parts

    @property
    def num_dims(self) -> int:
        return len(self.moved.shape)

    def scale_blocks(self) -> tuple[Tensor, Tensor]:
        """See `partitioner.program.program.HeldForm`."""
        *lead, outputs, inputs = self.moved.shape
        rows = torch.zeros(*(1 for _ in lead), outputs, dtype=torch.int64)
        for window in self.moved.block((*((0, 1) for _ in lead), (0, outputs), (0, inputs))):
            list(self._rows_of(window, [0] * rows.ndim, rows))
        columns, _ = self._columns(None)
        return torch.unique(rows, return_inverse=True)[1].reshape(-1), columns.long()

    def shards(self, shard: WeightShard) -> tuple[dict[str, WeightShard | None], dict[str, Tensor]]:
        """What a rank holds of a weight of which `shard` is its part, by role; and the data of what no file holds."""
        mine = inputs_last(shard, self.turned)
        columns, groups = self._columns(mine.indices[-1])
        rows = torch.zeros(mine.local_shape[:-1], dtype=torch.int64)
        whole_rows = replace(
            mine,
            indices=(*mine.indices[:-1], None),
            local_shape=(*mine.local_shape[:-1], mine.global_shape[-1]),
        )
        needed: list[tuple[int, int]] = []
        for own in whole_rows.own_pieces:
            for window in self.moved.block(own.source):
                needed += self._rows_of(window, [start for start, _ in own.destination], rows)
        table = _union(needed)
        dtype = self.files.entries[self.example.parts["scales"]].dtype
        dtype = torch.float32 if dtype == torch.float8_e8m0fnu else dtype
        scales = _shard(mine, "scales", dtype, (table.size, groups[1] - groups[0]), (), "parts")
        scales = replace(
            scales,
            global_shape=(self._starts[-1], self.example.grid[-1]),
            indices=(table, IndexSet.range(*groups)),
            pieces=tuple(self._scale_piece(*found) for found in self._blocks(table, groups)),
        )
        zeros = None
        if self.has_zeros:
            pieces = tuple(Piece(packed.name, block, target) for packed, block, target in self._blocks(table, groups))
            zeros = replace(scales, name=f"{mine.name}.zeros", dtype=torch.uint8, pieces=pieces, held="zeros")
        codes = replace(
            self._codes(mine),
            codes_of=CodesOf(replace(shard, aliases=(), pieces=()), self.code, self.computed_in, self.turned),
        )
        made, data = constants(mine, torch.searchsorted(torch.tensor(table.indices()), rows), columns)
        return {"codes": codes, "scales": scales, "zeros": zeros, **made}, data

    @functools.cached_property
    def _tensors(self) -> list[Packed]:
        """Those that it consists of, each once."""
        return [self.files.packed[name] for name in dict.fromkeys(window.tensor for window in self.moved.windows)]

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The row of the table of all scales with which those of each tensor begin; and where the last one's end."""
        sizes = (math.prod(packed.grid[:-1]) for packed in self._tensors)
        return list(itertools.accumulate(sizes, initial=0))

    @functools.cached_property
    def _bases(self) -> dict[str, int]:
        return {packed.name: start for packed, start in zip(self._tensors, self._starts, strict=False)}

    def _rows_of(self, window: Window, starts: list[int], rows: Tensor) -> Iterator[tuple[int, int]]:
        """Which rows of the table a window over all inputs needs; its part of `rows` is filled with them."""
        packed = self.files.packed[window.tensor]
        *_, outputs, inputs = packed.shape
        base, height = self._bases[window.tensor], packed.grid[-2]
        box, _, _ = Strided(window.block, window.offset, window.strides).box(packed.shape)
        (*experts, (first, last), _) = packed.scales_of(box)
        flat = torch.tensor(window.offset // inputs)
        for (low, high), stride in zip(window.block[:-1], window.strides[:-1], strict=True):
            flat = flat[..., None] + torch.arange(high - low) * (stride // inputs)
        place = tuple(
            slice(low + start, high + start) for (low, high), start in zip(window.block[:-1], starts, strict=False)
        )
        rows[place] = base + flat // outputs * height + flat % outputs // packed.block[0]
        for expert in range(*(experts[0] if experts else (0, 1))):
            yield base + expert * height + first, base + expert * height + last

    def _blocks(self, table: IndexSet, groups: tuple[int, int]) -> Iterator[tuple[Packed, Block, Block]]:
        """Of the grid of one tensor each, which blocks these rows of the table are, and their places among them."""
        count = 0
        for start, stop in table.intervals:
            while start < stop:
                which = bisect.bisect_right(self._starts, start) - 1
                packed, within = self._tensors[which], start - self._starts[which]
                expert, first = divmod(within, packed.grid[-2])
                height = min(stop - start, packed.grid[-2] - first)
                experts: Block = ((expert, expert + 1),) if len(packed.shape) == _MOST_DIMS else ()
                target: Block = ((count, count + height), (0, groups[1] - groups[0]))
                yield packed, (*experts, (first, first + height), groups), target
                count, start = count + height, start + height

    def _columns(self, owned: IndexSet | None) -> tuple[Tensor, tuple[int, int]]:
        """The group of each input of a rank, counted from the first that it holds; and from which to which."""
        size = self.example.shape[-1]
        intervals = ((0, size),) if owned is None else owned.intervals
        inputs = torch.cat([torch.arange(*ends) for ends in intervals]) if intervals else torch.arange(0)
        if self.example.groups is not None:
            groups = self.example.groups[inputs]
        else:
            groups = inputs // self.example.block[1]
        if not len(groups):
            return groups.to(torch.int32), (0, 1)
        first, last = int(groups.min()), int(groups.max())
        return (groups - first).to(torch.int32), (first, last + 1)

    def _scale_piece(self, packed: Packed, block: Block, target: Block) -> Piece:
        """From the grid as it is stored, which may be without its last dims of 1, or turned."""
        entry = self.files.entries[packed.parts["scales"]]
        steps = (1, packed.grid[-2]) if FORMATS[packed.format].turned else row_major(packed.grid)
        offset = sum(start * step for (start, _), step in zip(block, steps, strict=True))
        return Piece(entry.name, tuple((0, size) for size in entry.shape), target, offset, tuple(steps[-2:]))

    def _codes(self, mine: WeightShard) -> WeightShard:
        in_bytes = self.code == "float8"
        pieces: list[Piece] = []
        for own in mine.own_pieces:
            starts = [start for start, _ in own.destination]
            for window in self.moved.block(own.source):
                packed = self.files.packed[window.tensor]
                name = packed.parts["codes"] if in_bytes else window.tensor
                pieces.append(piece(replace(window, tensor=name), packed.shape, starts))
        dtype = self.files.entries[self.example.parts["codes"]].dtype if in_bytes else torch.uint8
        shape = mine.local_shape if in_bytes else (*mine.local_shape[:-1], -(-mine.local_shape[-1] // 2))
        return _shard(mine, "codes", dtype, shape, tuple(pieces), "parts" if in_bytes else "codes")


def inputs_last(shard: WeightShard, turned: bool) -> WeightShard:
    """A rank's part in the order of its codes."""
    order = list(range(len(shard.global_shape)))
    if turned:
        order[-2:] = order[:-3:-1]
    return replace(
        shard,
        indices=tuple(shard.indices[dim] for dim in order),
        global_shape=tuple(shard.global_shape[dim] for dim in order),
        local_shape=tuple(shard.local_shape[dim] for dim in order),
        aliases=(),
        pieces=(),
    )


def constants(mine: WeightShard, rows: Tensor, columns: Tensor) -> tuple[dict[str, WeightShard], dict[str, Tensor]]:
    """The rows and columns of a rank's scales, by role; and their data by name."""
    both = {"rows": rows.to(torch.int32), "columns": columns.to(torch.int32)}
    shards = {
        role: replace(_shard(mine, role, torch.int32, tuple(tensor.shape), ()), source="constant")
        for role, tensor in both.items()
    }
    return shards, {f"{mine.name}.{role}": tensor for role, tensor in both.items()}


def _union(intervals: list[tuple[int, int]]) -> IndexSet:
    found: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        elif start < stop:
            found.append((start, stop))
    return IndexSet(tuple(found))


def _shard(
    mine: WeightShard,
    role: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    pieces: tuple[Piece, ...],
    held: str | None = None,
) -> WeightShard:
    everywhere: tuple[IndexSet | None, ...] = (None,) * len(shape)
    return WeightShard(f"{mine.name}.{role}", dtype, shape, shape, everywhere, "checkpoint", (), pieces, held=held)


def _has_rows(window: Window, packed: Packed) -> bool:
    """Whether a window holds whole rows of a tensor: all inputs, in order."""
    inputs = packed.shape[-1]
    return (
        len(packed.shape) <= _MOST_DIMS
        and window.block[-1] == (0, inputs)
        and (window.strides[-1] == 1 or inputs == 1)
        and window.offset % inputs == 0
        and all(
            stride % inputs == 0
            for (low, high), stride in zip(window.block[:-1], window.strides[:-1], strict=True)
            if high - low > 1
        )
    )
