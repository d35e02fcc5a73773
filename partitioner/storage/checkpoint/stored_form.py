"""A weight that is held as it is stored: which shards of codes and scales a rank holds of it.

    "q_proj.weight" [N, K]   ->   "q_proj.weight.codes", ".scales", ".zeros" where there are such, ".rows", ".columns"

A weight can be held so if it consists of quantised tensors of one kind, whose inputs are its inputs, all of them and in
order: then each of its rows is a row of one of them. Experts that were stacked and projections that were fused are so;
what was divided or rearranged along the inputs is not, and is expanded. What the rows and columns of the result mean is
said in `runtime.ops.kernels.stored`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from partitioner.sharding.index_set import IndexSet
from partitioner.storage.checkpoint.strided_windows import Moved, Window, permute, piece
from runtime.program.shards import Block, Piece, WeightShard
from runtime.weights.quantized.formats import FORMATS
from runtime.weights.quantized.packed import Packed
from runtime.weights.safetensors_files import TensorFiles
from runtime.weights.strided_reads import Strided, row_major

__all__ = ["StoredForm"]

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

    def shards(self, shard: WeightShard) -> tuple[dict[str, WeightShard | None], dict[str, Tensor]]:
        """What a rank holds of a weight of which `shard` is its part, by role; and the data of what no file holds."""
        order = list(range(len(shard.global_shape)))
        if self.turned:
            order[-2:] = order[:-3:-1]
        mine = replace(
            shard,
            indices=tuple(shard.indices[dim] for dim in order),
            global_shape=tuple(shard.global_shape[dim] for dim in order),
            local_shape=tuple(shard.local_shape[dim] for dim in order),
            aliases=(),
            pieces=(),
        )
        columns, groups = self._columns(mine.indices[-1])
        found = _Rows(self, groups)
        rows = torch.zeros(mine.local_shape[:-1], dtype=torch.int32)
        whole_rows = replace(
            mine,
            indices=(*mine.indices[:-1], None),
            local_shape=(*mine.local_shape[:-1], mine.global_shape[-1]),
        )
        for own in whole_rows.own_pieces:
            for window in self.moved.block(own.source):
                starts = [start for start, _ in own.destination]
                found.add(window, starts, rows)
        made: dict[str, WeightShard | None] = {"codes": self._codes(mine)}
        table = (found.count, groups[1] - groups[0])
        scales = self.files.entries[self.example.parts["scales"]].dtype
        scales = torch.float32 if scales == torch.float8_e8m0fnu else scales
        made["scales"] = _shard(mine, "scales", scales, table, tuple(found.scales), "parts")
        has_zeros = "zeros" in self.example.parts
        made["zeros"] = _shard(mine, "zeros", torch.uint8, table, tuple(found.zeros), "zeros") if has_zeros else None
        data = {f"{shard.name}.rows": rows, f"{shard.name}.columns": columns}
        for role, tensor in (("rows", rows), ("columns", columns)):
            made[role] = replace(_shard(mine, role, torch.int32, tuple(tensor.shape), ()), source="constant")
        return made, data

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


class _Rows:
    """The rows of the table of scales that are needed, block by block."""

    def __init__(self, form: StoredForm, groups: tuple[int, int]) -> None:
        self.form, self.groups, self.count = form, groups, 0
        self.scales: list[Piece] = []
        self.zeros: list[Piece] = []

    def add(self, window: Window, starts: list[int], rows: Tensor) -> None:
        """Those of a window over all inputs; its part of `rows` is filled."""
        packed = self.form.files.packed[window.tensor]
        *_, outputs, inputs = packed.shape
        spot = Strided(window.block, window.offset, window.strides)
        box, _, _ = spot.box(packed.shape)
        (*experts, (first, last), _) = packed.scales_of(box)
        height = last - first
        ends = experts[0] if experts else (0, 1)
        flat = torch.tensor(window.offset // inputs)
        for (low, high), stride in zip(window.block[:-1], window.strides[:-1], strict=True):
            flat = flat[..., None] + torch.arange(high - low) * (stride // inputs)
        table = (flat // outputs - ends[0]) * height + flat % outputs // packed.block[0] - first
        place = tuple(
            slice(low + start, high + start) for (low, high), start in zip(window.block[:-1], starts, strict=False)
        )
        rows[place] = (table + self.count).to(torch.int32)
        for expert in range(*ends):
            block: Block = (*(((expert, expert + 1),) if experts else ()), (first, last), self.groups)
            target: Block = ((self.count, self.count + height), (0, self.groups[1] - self.groups[0]))
            self.scales.append(self._scale_piece(packed, block, target))
            self.zeros.append(Piece(window.tensor, block, target))
            self.count += height

    def _scale_piece(self, packed: Packed, block: Block, target: Block) -> Piece:
        """From the grid as it is stored, which may be without its last dims of 1, or turned."""
        entry = self.form.files.entries[packed.parts["scales"]]
        steps = (1, packed.grid[-2]) if FORMATS[packed.format].turned else row_major(packed.grid)
        offset = sum(start * step for (start, _), step in zip(block, steps, strict=True))
        return Piece(entry.name, tuple((0, size) for size in entry.shape), target, offset, tuple(steps[-2:]))


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
