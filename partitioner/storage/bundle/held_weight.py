"""A weight that the ranks of a bundle hold as stored, put together from their parts and cut for other ranks.

Codes are cut where the ranks of the other plan have their parts, in the middle of a byte as well. Scales and zeros are
rows and columns of one table (`partitioner.storage.checkpoint.stored_form`): a new rank holds those that its rows and
inputs name, each once, whichever of the ranks had them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from partitioner.errors import WeightError
from partitioner.sharding.index_set import IndexSet
from partitioner.storage.bundle.held_slices import HeldSlice
from partitioner.storage.bundle.slice_pieces import Part, cover, part_of, pieces
from partitioner.storage.checkpoint.stored_form import constants, inputs_last
from runtime.program.shards import CodesOf, Piece, WeightShard
from runtime.weights.strided_reads import row_major

__all__ = ["HeldWeight"]


@dataclass(frozen=True)
class HeldWeight:
    """slices: at least one, all of one kind. cut: the pieces of a part of a table that the ranks hold by rows and
    columns. where: the bundle, for errors.
    """

    name: str
    slices: Sequence[HeldSlice]
    cut: Callable[[WeightShard], tuple[Piece, ...]]
    where: str

    @property
    def code(self) -> str:
        return self.slices[0].of.code

    @property
    def computed_in(self) -> torch.dtype:
        return self.slices[0].of.computed_in

    @property
    def has_zeros(self) -> bool:
        return self.slices[0].zeros is not None

    @property
    def turned(self) -> bool:
        return self.slices[0].of.turned

    @property
    def num_dims(self) -> int:
        return len(self.slices[0].of.weight.global_shape)

    def numbers(self, shard: WeightShard) -> tuple[Piece, ...]:
        """Where the numbers of a part of the weight lie, in its own order of dims."""
        return tuple(
            self._in_own_order(piece, own) if self.turned else piece for own, piece in self._codes(self._mine(shard))
        )

    def scale_blocks(self) -> tuple[Tensor, Tensor]:
        """See `partitioner.program.program.HeldForm`."""
        *lead, outputs, inputs = inputs_last(self.slices[0].of.weight, self.turned).global_shape
        first = (*(IndexSet.range(0, 1) for _ in lead), *(IndexSet.range(0, size) for size in (outputs, inputs)))
        rows, groups = self._scales_of(first)
        return torch.unique(rows, return_inverse=True)[1].reshape(-1), torch.unique(groups, return_inverse=True)[1]

    def shards(self, shard: WeightShard) -> tuple[dict[str, WeightShard | None], dict[str, Tensor]]:
        """See `partitioner.program.program.HeldForm`."""
        mine = self._mine(shard)
        rows, groups = self._scales_of(part_of(mine))
        table = tuple(IndexSet.of(torch.unique(each).tolist()) for each in (rows, groups))
        places = [
            torch.searchsorted(torch.tensor(own.indices(), dtype=torch.int64), each)
            for own, each in zip(table, (rows, groups), strict=True)
        ]
        first, in_bytes = self.slices[0], self.code == "float8"
        shape = mine.local_shape if in_bytes else (*mine.local_shape[:-1], -(-mine.local_shape[-1] // 2))
        codes = WeightShard(
            f"{self.name}.codes", first.codes.dtype, shape, shape, (None,) * len(shape), "checkpoint", (),
            tuple(piece for _, piece in self._codes(mine)), held="parts" if in_bytes else "codes",
            codes_of=CodesOf(replace(shard, aliases=(), pieces=()), self.code, self.computed_in, self.turned),
        )  # fmt: skip
        found: dict[str, WeightShard | None] = {"codes": codes, "scales": None, "zeros": None}
        for role, like in (("scales", first.scales), ("zeros", first.zeros)):
            if like is not None:
                local = tuple(own.size for own in table)
                part = replace(like, local_shape=local, indices=table, digest=None, pieces=(), held="parts")
                found[role] = replace(part, pieces=self.cut(part))
        made, data = constants(mine, *places)
        return found | made, data

    def _mine(self, shard: WeightShard) -> WeightShard:
        of = self.slices[0].of.weight
        if (shard.global_shape, shard.dtype) != (of.global_shape, of.dtype):
            raise WeightError(
                f"{shard.name!r} is stored as {of.dtype} {list(of.global_shape)}; this model needs {shard.dtype} "
                f"{list(shard.global_shape)}"
            )
        return replace(inputs_last(shard, self.turned), name=self.name)

    def _codes(self, mine: WeightShard) -> Iterator[tuple[HeldSlice, Piece]]:
        wanted = part_of(mine)
        for own, common in cover(wanted, [(each, each.part) for each in self.slices], self.name, self.where):
            for piece in pieces(own.key, common, own.part, wanted):
                yield own, piece

    @staticmethod
    def _in_own_order(piece: Piece, own: HeldSlice) -> Piece:
        """The block of a slice, whose inputs are last, with its inputs before its outputs."""
        shape = own.packed.shape
        steps = row_major(shape)
        offset = sum(start * step for (start, _), step in zip(piece.source, steps, strict=True))
        *outer, outputs, inputs = piece.destination
        block = (*outer, inputs, outputs)
        return Piece(
            piece.tensor, tuple((0, size) for size in shape), block, offset, (*steps[:-2], steps[-1], steps[-2])
        )

    def _scales_of(self, wanted: Part) -> tuple[Tensor, Tensor]:
        """The row and the column of the table of all scales for each row and input of a part."""
        *outer, inputs = wanted
        rows = torch.full([own.size for own in outer], -1, dtype=torch.int64)
        groups = torch.full((inputs.size,), -1, dtype=torch.int64)
        for each in self.slices:
            self._fill(rows, each.rows, outer, each.part[:-1])
            self._fill(groups, each.groups, (inputs,), each.part[-1:])
        for numbers in (rows, groups):
            if numbers.numel() and int(numbers.min()) < 0:
                raise WeightError(f"{self.where} does not hold all of the weight {self.name!r}")
        return rows, groups

    def _fill(self, into: Tensor, given: Tensor, wanted: Sequence[IndexSet], held: Sequence[IndexSet]) -> None:
        runs = [
            [(slice(new.index(a), new.index(a) + b - a), slice(own.index(a), own.index(a) + b - a)) for a, b in common]
            for new, own in zip(wanted, held, strict=True)
            for common in [(new & own).intervals]
        ]
        for block in itertools.product(*runs):
            target, found = into[tuple(to for to, _ in block)], given[tuple(at for _, at in block)]
            if bool(((target >= 0) & (target != found)).any()):
                raise WeightError(
                    f"{self.where}: two ranks name different scales for one row or input of the stored weight "
                    f"{self.name!r}: the bundle was altered; write it anew"
                )
            target.copy_(found)
