"""Where the elements of a piece lie in a tensor's file: at regular steps, from which follow the runs to read.

spot = Strided.of(piece, shape)      extents and strides, in elements of the whole tensor
spot.strips(limit)                   parts small enough to be read at once
spot.plan(shortest)                  the runs of such a part, and where its elements are in what they read
spot.box(shape)                      or a block of the tensor that holds them, where what is read is no run of bytes
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from runtime.program.shards import Block, Piece, extents

__all__ = ["Plan", "Strided", "row_major", "unravel"]


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def unravel(number: int, shape: tuple[int, ...]) -> list[int]:
    """The index of element `number`, counted in row-major order."""
    return [number // stride % size if size else 0 for stride, size in zip(row_major(shape), shape, strict=True)]


@dataclass(frozen=True)
class Plan:
    """`runs`: (first element, number) in the file, to be put one after the other into a buffer; element [i, ...] of
    the part is then number `sum(i * strides)` of the buffer.
    """

    runs: list[tuple[int, int]]
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        return sum(length for _, length in self.runs)


@dataclass(frozen=True)
class Strided:
    """Element [i, ...] of `destination`, a block of the local tensor, is number `offset + sum(i * strides)` there."""

    destination: Block
    offset: int
    strides: tuple[int, ...]

    @classmethod
    def of(cls, piece: Piece, shape: tuple[int, ...]) -> Strided | None:
        """None where the piece does not fit a tensor of that shape."""
        inside = len(piece.source) == len(shape) and all(
            0 <= start <= stop <= size for (start, stop), size in zip(piece.source, shape, strict=True)
        )
        if not inside:
            return None
        if piece.strides is not None:
            found = cls(piece.destination, piece.offset, piece.strides)
            return found if found._within(math.prod(shape)) else None
        steps = row_major(shape)
        box = extents(piece.source)
        moving = [step for step, extent in zip(steps, box, strict=True) if extent != 1]
        wanted = extents(piece.destination)
        if [extent for extent in box if extent != 1] != [extent for extent in wanted if extent != 1]:
            return None
        left = iter(moving)
        strides = tuple(0 if extent == 1 else next(left) for extent in wanted)
        first = sum(start * step for (start, _), step in zip(piece.source, steps, strict=True))
        return cls(piece.destination, first, strides)

    def _within(self, elements: int) -> bool:
        shape = extents(self.destination)
        if len(self.strides) != len(shape) or min((self.offset, *self.strides)) < 0:
            return False
        last = self.offset + sum((n - 1) * stride for n, stride in zip(shape, self.strides, strict=True))
        return 0 in shape or last < elements

    def strips(self, limit: int, shortest: int, *, along_rows: bool = True) -> Iterator[Strided]:
        """Parts whose plans read at most `limit` elements, as far as there is a dim to cut; rows stay whole, or
        columns.
        """
        outermost = self._outermost(1 if along_rows else -1)
        if outermost is None or self._elements(shortest) <= limit:
            yield self
            return
        start, stop = self.destination[outermost]
        one = self._narrow(outermost, start, start + 1)._elements(shortest)
        step = max(1, min(limit // one, (stop - start + 1) // 2))
        for at in range(start, stop, step):
            part = self._narrow(outermost, at, min(at + step, stop))
            yield from part.strips(limit, shortest, along_rows=along_rows)

    def _outermost(self, sign: int) -> int | None:
        moving = [dim for dim, (start, stop) in enumerate(self.destination) if stop - start > 1]
        return max(moving, key=lambda dim: sign * self.strides[dim], default=None)

    def _narrow(self, dim: int, start: int, stop: int) -> Strided:
        block = (*self.destination[:dim], (start, stop), *self.destination[dim + 1 :])
        return Strided(block, self.offset + (start - self.destination[dim][0]) * self.strides[dim], self.strides)

    def plan(self, shortest: int) -> Plan:
        """Runs of fewer than `shortest` elements are read together with what lies between them."""
        shape = extents(self.destination)
        length, outer = self._run(shortest)
        strides = [0 if dim in outer or n == 1 else self.strides[dim] for dim, n in enumerate(shape)]
        between = length
        for dim in reversed(outer):
            strides[dim] = between
            between *= shape[dim]
        steps = [range(0, shape[dim] * self.strides[dim], self.strides[dim]) for dim in outer]
        return Plan([(self.offset + sum(at), length) for at in itertools.product(*steps)], tuple(strides))

    def box(self, shape: tuple[int, ...]) -> tuple[Block, int, tuple[int, ...]]:
        """A block of the tensor of `shape` with all elements of this part; offset and strides of them within it."""
        counts = extents(self.destination)
        first = unravel(self.offset, shape)
        steps = [unravel(stride if n > 1 else 0, shape) for n, stride in zip(counts, self.strides, strict=True)]
        reach = [
            low + sum((n - 1) * step[dim] for n, step in zip(counts, steps, strict=True))
            for dim, low in enumerate(first)
        ]
        if all(high < size for high, size in zip(reach, shape, strict=True)):
            block = tuple((low, high + 1) for low, high in zip(first, reach, strict=True))
            own = row_major(extents(block))
            return block, 0, tuple(sum(a * b for a, b in zip(step, own, strict=True)) for step in steps)
        # steps that go from one row to the next: whole rows of the first dim
        row = math.prod(shape[1:])
        last = self.offset + sum((n - 1) * stride for n, stride in zip(counts, self.strides, strict=True))
        start = self.offset // row
        block = ((start, last // row + 1), *((0, size) for size in shape[1:]))
        return block, self.offset - start * row, self.strides

    def _elements(self, shortest: int) -> int:
        """What the plan reads."""
        length, outer = self._run(shortest)
        shape = extents(self.destination)
        return length * math.prod(shape[dim] for dim in outer)

    def _run(self, shortest: int) -> tuple[int, list[int]]:
        """The length of a run, and the dims along which runs follow each other, outermost first."""
        shape = extents(self.destination)
        dims = sorted((dim for dim, n in enumerate(shape) if n > 1), key=lambda dim: -self.strides[dim])
        length = 1
        # up to its length, another step of the same run; beyond, what lies between is read too
        while dims and (self.strides[dims[-1]] <= length or length < shortest):
            dim = dims.pop()
            length += (shape[dim] - 1) * self.strides[dim]
        return length, dims
