"""Which part of each weight and state a rank holds, and where its elements lie.

    WeightShard   one tensor of the rank: its shape, and the pieces it is put together from
    Made          how a weight that no source holds is made from one that it does hold
    CodesOf       of which weight codes are, where it is held as codes and scales
    Piece         a block of a source tensor and the block of the local tensor it fills
    StateShard    what the rank keeps of each sequence between runs, such as a layer's keys
    WeightSource  where the data comes from

Weights are described, never held: the device, the dtype's storage and the source of the data are chosen at load.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from partitioner.sharding.index_set import IndexSet
from runtime.ops.kernels.float8_rows import SCALE_BYTES, num_scales

__all__ = [
    "CODES", "Block", "CodesOf", "Made", "Piece", "ShardReader", "StateShard", "WeightShard", "WeightSource", "at",
    "extents",
]  # fmt: skip

CODES = ("float8", "float4", "int4")
"""What a code of a quantised weight stands for before it is scaled; those of four bits are held two in a byte."""

Block = tuple[tuple[int, int], ...]
"""A half-open range per dim."""


@dataclass(frozen=True)
class Piece:
    """`local[destination] = tensor[source]`; with strides, a rearrangement of elements that lie in `tensor[source]`.

    A checkpoint may store a weight in another order: transposed, interleaved, one tensor per expert. Element
    `[i, j, ...]` of the destination block is then number `offset + i * strides[0] + j * strides[1] + ...` of the
    tensor, counted in row-major order. Without strides, both blocks have the same extents but for those of 1.
    """

    tensor: str
    source: Block
    destination: Block
    offset: int = 0
    strides: tuple[int, ...] | None = None


def extents(block: Block) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in block)


def at(block: Block) -> tuple[slice, ...]:
    """`tensor[at(block)]`; () is the whole of a scalar."""
    return tuple(slice(*ends) for ends in block)


@dataclass(frozen=True)
class Made:
    """`make(the whole tensor of)` is the whole weight: no part of it may depend on which ranks there are.

    `make` is a function of a module, so that two programs that name it agree on what they share.
    """

    of: WeightShard
    make: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CodesOf:
    """weight: the rank's part that codes stand for, in its own order of dims. code: one of `CODES`. computed_in: the
    dtype of the product with the scale. turned: whether its inputs stand before its outputs; in codes they are last.
    """

    weight: WeightShard
    code: str
    computed_in: torch.dtype
    turned: bool


@dataclass(frozen=True)
class WeightShard:
    """One weight of a rank; `indices[d]` are the indices of dim d that the rank holds, None for all of them.

    source: "checkpoint", "computed" (a buffer absent from checkpoints), "constant" or "made" (see `Made`). pieces:
    where its elements lie, in the tensors of the files where the program comes from such, in the model's own weight
    otherwise.
    """

    name: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    indices: tuple[IndexSet | None, ...]
    source: str
    aliases: tuple[str, ...]
    pieces: tuple[Piece, ...]
    made: Made | None = None
    digest: str | None = None
    """SHA-256 of its bytes, row-major, where they must be these."""
    held: str | None = None
    """What its pieces are of quantised tensors: "codes", two in a byte of the last dim, "zeros", or "parts", the stored
    tensors as they are; None: numbers.
    """
    codes_of: CodesOf | None = None

    @property
    def is_whole(self) -> bool:
        return self.local_shape == self.global_shape

    @property
    def own_pieces(self) -> tuple[Piece, ...]:
        """Where its elements lie in the model's own weight: one piece per run of indices that lie together."""
        runs = []
        for size, owned in zip(self.global_shape, self.indices, strict=True):
            intervals = ((0, size),) if owned is None else owned.intervals
            ends = itertools.accumulate((stop - start for start, stop in intervals), initial=0)
            runs.append(list(zip(intervals, itertools.pairwise(ends), strict=True)))
        return tuple(
            Piece(self.name, tuple(source for source, _ in block), tuple(destination for _, destination in block))
            for block in itertools.product(*runs)
        )

    @property
    def bytes(self) -> int:
        return torch.Size(self.local_shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StateShard:
    """`shape`: of this rank, per token or once per sequence; `sees`: how many positions back a later token may look,
    None for all; `block`: how many tokens lie together, None for all of a row's; `token_axes`: those whose ranks share
    out the tokens; `float8`: whether it is held as codes and scales, which the cache's size says.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sees: int | None
    per_token: bool = True
    block: int | None = None
    token_axes: tuple[str, ...] = ()
    float8: bool = False

    @property
    def bytes(self) -> int:
        """Per token, or of the whole sequence."""
        if self.float8:
            rows = torch.Size(self.shape[:-1]).numel()
            return rows * (self.shape[-1] + SCALE_BYTES * num_scales(self.shape[-1]))
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardReader(Protocol):
    """Reads the pieces of shards, from a checkpoint's files for instance."""

    def load(self, shards: Sequence[WeightShard], device: torch.device, *, progress: bool = False) -> list[Tensor]: ...


WeightSource = Mapping[str, Tensor] | Callable[[str, Block], Tensor] | ShardReader
"""Whole tensors by name (a state_dict), a callable (name, block) -> that block of the tensor, or a reader of files."""
