"""Where the weights of a model lie in the files of its checkpoint.

origins.of(shard)     the pieces of a rank's part of a weight
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from partitioner.errors import WeightError
from partitioner.storage.checkpoint.stored_form import StoredForm
from partitioner.storage.checkpoint.strided_windows import Moved, piece
from runtime.program.shards import Piece, WeightShard, extents
from runtime.weights.read_shards import Reader
from runtime.weights.safetensors_files import TensorFiles

__all__ = ["Origins"]


@dataclass(frozen=True)
class Origins:
    """By the model's names, aliases included: `moved`, and `computed`, why a weight lies in no file; `cast`, the dtype
    of those that the files store in another. `mapped`: as in `runtime.weights.read_shards`.
    """

    files: TensorFiles
    moved: Mapping[str, Moved]
    computed: Mapping[str, str]
    cast: Mapping[str, torch.dtype]
    mapped: bool = False

    @property
    def folder(self) -> str:
        return str(self.files.folder)

    @functools.cached_property
    def source(self) -> Reader:
        return Reader(self.files, mapped=self.mapped)

    def find(self, name: str, aliases: Sequence[str]) -> Moved:
        """Raises `WeightError` where the files do not hold the weight."""
        for known in (name, *aliases):
            if known in self.moved:
                return self.moved[known]
        for known in (name, *aliases):
            if known in self.computed:
                raise WeightError(
                    f"the weight {known!r} is not stored in {self.folder} as the model has it: {self.computed[known]} "
                    "when transformers loads it; load the model by from_pretrained and partition that"
                )
        raise WeightError(
            f"the checkpoint {self.folder} does not hold the weight {name!r}, and transformers would draw it at "
            "random: complete the checkpoint, or load the model by from_pretrained and partition that"
        )

    @property
    def has_quantized(self) -> bool:
        return bool(self.files.packed)

    def held_form(self, name: str, aliases: Sequence[str]) -> StoredForm | None:
        """How a weight is held as it is stored; None where it cannot be."""
        return StoredForm.of(self.find(name, aliases), self.files)

    def of(self, shard: WeightShard) -> tuple[Piece, ...]:
        """The pieces of a rank's part of a weight."""
        moved = self.find(shard.name, shard.aliases)
        cast = self.cast.get(shard.name, shard.dtype)
        if shard.dtype != cast:  # one cast does not round as two do
            raise WeightError(
                f"{shard.name!r} is stored otherwise, read as {cast}, and cannot be had as {shard.dtype}: "
                f"partition the folder with dtype={shard.dtype}"
            )
        found: list[Piece] = []
        for own in shard.own_pieces:
            starts = [start for start, _ in own.destination]
            found += (piece(window, self.files.shape(window.tensor), starts) for window in moved.block(own.source))
        filled = sum(math.prod(extents(p.destination)) for p in found)
        assert filled == math.prod(shard.local_shape), f"{shard.name}: {filled} elements of {shard.local_shape}"
        return tuple(found)
