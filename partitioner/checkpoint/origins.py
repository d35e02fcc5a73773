"""Where the weights of a model lie in the files of its checkpoint.

origins.pieces(name, block, starts)     the pieces of a block of a weight, to be put where `starts` says
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from partitioner.checkpoint.windows import Moved, piece
from partitioner.errors import WeightError
from runtime.rank_program import Piece, WeightShard
from runtime.reading import Reader
from runtime.tensor_files import TensorFiles

__all__ = ["Origins"]


@dataclass(frozen=True)
class Origins:
    """`moved`: by the model's names, aliases included; `shapes`: of the stored tensors, by theirs."""

    folder: str
    moved: Mapping[str, Moved]
    shapes: Mapping[str, tuple[int, ...]]

    @functools.cached_property
    def source(self) -> Reader:
        return Reader(TensorFiles(self.folder))

    def of(self, shard: WeightShard) -> tuple[Piece, ...]:
        """The pieces of a rank's part of a weight."""
        name = next((name for name in (shard.name, *shard.aliases) if name in self.moved), None)
        if name is None:
            raise WeightError(
                f"the checkpoint {self.folder} does not hold the weight {shard.name!r}, and transformers would draw it "
                "at random: complete the checkpoint, or load the model by from_pretrained and partition that"
            )
        found: list[Piece] = []
        for own in shard.own_pieces:
            starts = [start for start, _ in own.destination]
            found += (
                piece(window, self.shapes[window.tensor], starts) for window in self.moved[name].block(own.source)
            )
        return tuple(found)
