"""What a method of quantisation looks for among the tensors of a checkpoint, and the errors where it is not there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import CaptureError, WeightError
from partitioner.sharding.index_set import IndexSet
from runtime.program.shards import Piece, WeightShard
from runtime.weights.quantized.packed import Packed
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import Entry, TensorFiles

__all__ = ["FLOAT8", "SCALES", "Finder", "Quantized", "said"]

SCALES = (torch.float32, torch.bfloat16, torch.float16)
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_LARGEST_GROUP = 1 << 24


@dataclass
class Quantized:
    """packed: by the name under which transformers looks for the tensor. turned: those that it transposes. used: the
    stored tensors that they consist of, or that only quantised activations need.
    """

    packed: dict[str, Packed] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)

    def add(self, packed: Packed, *others: str) -> None:
        self.packed[packed.name] = packed
        self.used.update(packed.parts.values(), others)

    @property
    def notes(self) -> tuple[str, ...]:
        if not self.unused:
            return ()
        return (
            f"{len(self.unused)} scales of quantised activations or caches not used, {self.unused[0]!r} for one: "
            "activations are not quantised, and a cache in FP8 computes its own",
        )


@dataclass
class Finder:
    files: TensorFiles
    fields: Mapping[str, Any]
    where: str
    found: Quantized

    def get(self, name: str, owner: str) -> Entry:
        if name not in self.files.entries:
            raise WeightError(
                f"{self.where} lacks {name!r}, which the quantised tensor {owner!r} needs: complete the checkpoint"
            )
        return self.files.entries[name]

    def ending(self, suffix: str) -> list[str]:
        """What stands before `suffix` in the names that end with it."""
        return [name.removesuffix(suffix) for name in self.files.entries if name.endswith(suffix)]

    def require(self, fits: bool, entry: Entry, required: str) -> None:
        if not fits:
            raise WeightError(
                f"{self.where}: {entry.name!r} is {said(entry)}; required: {required}; the checkpoint is damaged, or "
                "its quantization_config that of another"
            )

    def integer(self, fields: Mapping[str, Any], name: str, default: int) -> int:
        value = fields.get(name, default)
        if type(value) is not int or not (1 <= value <= _LARGEST_GROUP or value == -1):
            raise CaptureError(
                f"{self.where}: {name} of quantization_config must be a whole number of at least 1, got "
                f"{str(value)[:100]!r}"
            )
        return value

    def four_bits(self, fields: Mapping[str, Any], name: str) -> None:
        if (bits := self.integer(fields, name, 4)) != 4:
            raise CaptureError(
                f"{self.where} is quantised to {bits} bits by {self.fields.get('quant_method')}: only 4 bits can be "
                "read by parts; dequantise it and save that"
            )

    def one_of(self, name: str, default: str, known: tuple[str, ...]) -> str:
        value = self.fields.get(name)
        value = default if value is None else value.lower() if isinstance(value, str) else value
        if value not in known:
            raise CaptureError(
                f"{self.where}: quantization_config has {name}={str(value)[:100]!r}; those that can be read by parts: "
                f"{', '.join(known)}; dequantise it and save that"
            )
        return str(value)

    def numbers(self, entry: Entry) -> Tensor:
        """All of a small tensor of integers."""
        block = tuple((0, size) for size in entry.shape)
        indices: tuple[IndexSet | None, ...] = (None,) * len(block)
        shard = WeightShard(
            entry.name,
            entry.dtype,
            entry.shape,
            entry.shape,
            indices,
            "checkpoint",
            (),
            (Piece(entry.name, block, block),),
        )
        return Reader(self.files).load([shard], torch.device("cpu"))[0].to(torch.int64)

    def block_of(self, name: str, default: Any) -> tuple[int, int] | None:
        return self.pair(self.fields.get(name, default), name)

    def pair(self, value: Any, name: str) -> tuple[int, int] | None:
        if value is None:
            return None
        if (
            not isinstance(value, (list, tuple))
            or len(value) != 2
            or not all(type(n) is int and 1 <= n <= _LARGEST_GROUP for n in value)
        ):
            raise CaptureError(
                f"{self.where}: {name} of quantization_config must be two whole numbers such as [128, 128], got "
                f"{str(value)[:100]!r}"
            )
        return value[0], value[1]

    def scaled(
        self,
        name: str,
        scales: str,
        blocks: Sequence[tuple[int, int]],
        computed_in: torch.dtype | None,
        *,
        is_complete: bool = False,
    ) -> None:
        """Codes of a byte each, and a grid of scales. blocks: those that the configuration has, 0 for the whole dim;
        is_complete: there are no others. `computed_in`: None for the dtype of the scales.
        """
        codes, scale = self.get(name, name), self.get(scales, name)
        self.require(
            codes.dtype in (*FLOAT8, torch.int8) and len(codes.shape) >= 2, codes, "a matrix of float8 or int8"
        )
        self.require(scale.dtype in (*SCALES, *EXPONENTS), scale, "scales of 16 bits, 32 bits or powers of two")
        found = _block(codes.shape, scale.shape, blocks, is_complete=is_complete)
        if found is None:
            sizes = codes.shape[-2:]
            named = sorted({str(tuple(n or size for n, size in zip(block, sizes, strict=True))) for block in blocks})
            each = f"block of {' or '.join(named)}" if blocks else "row"
            self.require(False, scale, f"one scale for each {each} of {name!r}, {said(codes)}")
        assert found is not None
        inside = scale.dtype if computed_in is None and scale.dtype in SCALES else torch.float32
        self.found.add(Packed(name, "fp8", codes.shape, {"codes": name, "scales": scales}, found, inside))

    def ordered(self, packed: Packed, groups: str, *, is_needed: bool, least: int = 0) -> Packed:
        """With the group of each column, if a part tells it and it is another than that of its place. is_needed:
        whether that part must be there. least: the smallest group; below 0 stands for that of the place.
        """
        if groups not in self.files.entries and not is_needed:
            return packed
        entry = self.get(groups, packed.name)
        cols, size, most = packed.shape[-1], packed.block[1], packed.grid[-1]
        self.require(
            entry.dtype in (torch.int32, torch.int64) and entry.shape == (cols,),
            entry,
            f"int32 {[cols]}, a group per column",
        )
        self.found.used.add(groups)
        given, places = self.numbers(entry), torch.arange(cols) // size
        self.require(
            least <= int(given.min()) <= int(given.max()) < most,
            entry,
            f"groups from 0 to {most - 1}, got {given.min()} to {given.max()}",
        )
        if int(given.min()) < 0 or torch.equal(given, places):
            return packed
        return dataclasses.replace(packed, groups=given)

    def unused(self, *suffixes: str) -> None:
        """Scales of activations: of no use where these are not quantised."""
        for name in self.files.entries:
            if name.endswith(suffixes):
                self.found.unused.append(name)
                self.found.used.add(name)


def said(entry: Entry) -> str:
    return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"


def _block(
    shape: tuple[int, ...], scales: tuple[int, ...], blocks: Sequence[tuple[int, int]], *, is_complete: bool
) -> tuple[int, int] | None:
    """The rows and columns that one scale is for; None where the shapes do not fit.

    A grid of a block that the configuration names is taken so, its last blocks may be cut off. Two blocks with the same
    grid do not tell which is meant, unless one is even. Any other grid must divide the tensor into blocks that somebody
    may have chosen: whole rows or columns, or powers of two.
    """
    *lead, rows, cols = shape
    if 0 in shape or 0 in scales:
        return None
    grid = scales
    if math.prod(scales) == 1 and math.prod(lead) == 1 and len(scales) <= len(shape):
        grid = (*lead, 1, 1)
    elif scales == (*lead, rows):
        grid = (*lead, rows, 1)
    sizes = dict.fromkeys((min(high or rows, rows), min(wide or cols, cols)) for high, wide in blocks)
    named = [each for each in sizes if grid == (*lead, -(-rows // each[0]), -(-cols // each[1]))]
    if len(named) == 1:
        return named[0]
    if named:
        return next((each for each in named if not (rows % each[0] or cols % each[1])), None)
    if is_complete or len(grid) != len(shape) or list(grid[:-2]) != lead or rows % grid[-2] or cols % grid[-1]:
        return None
    found = rows // grid[-2], cols // grid[-1]
    is_likely = all(size in (1, whole) or size & (size - 1) == 0 for size, whole in zip(found, shape[-2:], strict=True))
    return found if is_likely else None
