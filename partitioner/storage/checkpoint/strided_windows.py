"""Moves as arithmetic: where the elements of a tensor that was put together from others lie in those others.

    tensor = whole("experts.0.up", (48, 64))                    Moved: a shape, and windows that tile it
    stacked = concatenate([reshape(t, (1, 48, 64)) ...], 0)     one window per expert
    stacked.block(((3, 4), (0, 24), (0, 64)))                   the windows within a block

A window is a block of the tensor whose elements lie at regular steps in one stored tensor. Every move of data
(transpose, slice, stack, concatenate, view) takes windows to windows, some of them cut. So a whole chain of moves
becomes a list of blocks, whatever it consists of, and nothing has to run when they are read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from runtime.program.shards import Block, Piece, extents
from runtime.weights.strided_reads import row_major, unravel

__all__ = ["Moved", "Window", "concatenate", "narrow", "permute", "reshape", "whole"]


@dataclass(frozen=True)
class Window:
    """Element [i, ...] of `block` is number `offset + sum(i * strides)` of `tensor`, in row-major order."""

    block: Block
    tensor: str
    offset: int
    strides: tuple[int, ...]

    def within(self, dim: int, start: int, stop: int, *, step: int = 1) -> Window | None:
        """Of this window what lies at `start`, `start + step`... before `stop`, counted from there; None: nothing."""
        low, high = self.block[dim]
        first = max(start, low + (start - low) % step)
        count = len(range(first, min(stop, high), step))
        if not count:
            return None
        at = (first - start) // step
        return self._put(dim, (at, at + count), self.strides[dim] * step, (first - low) * self.strides[dim])

    def shifted(self, dim: int, by: int) -> Window:
        low, high = self.block[dim]
        return self._put(dim, (low + by, high + by), self.strides[dim], 0)

    def _put(self, dim: int, ends: tuple[int, int], stride: int, moved: int) -> Window:
        block = (*self.block[:dim], ends, *self.block[dim + 1 :])
        strides = (*self.strides[:dim], stride, *self.strides[dim + 1 :])
        return replace(self, block=block, strides=strides, offset=self.offset + moved)

    def merged(self, dim: int, size: int) -> Iterator[Window]:
        """Dim and the next one, which has `size` indices, become one; where steps do not fit, a window per row."""
        (a, b), (c, d) = self.block[dim : dim + 2]
        outer, inner = self.strides[dim : dim + 2]

        def joined(ends: tuple[int, int], stride: int, moved: int) -> Window:
            block = (*self.block[:dim], ends, *self.block[dim + 2 :])
            strides = (*self.strides[:dim], stride, *self.strides[dim + 2 :])
            return replace(self, block=block, strides=strides, offset=self.offset + moved)

        if size == 1:
            yield joined((a, b), outer, 0)
        elif (c, d) == (0, size) and outer == inner * size:
            yield joined((a * size, b * size), inner, 0)
        else:
            for row in range(a, b):
                yield joined((row * size + c, row * size + d), inner, (row - a) * outer)

    def divided(self, dim: int, size: int) -> Iterator[Window]:
        """Dim becomes two, the second with `size` indices; a first and a last row that are not full are cut off."""
        (a, b), stride = self.block[dim], self.strides[dim]
        # a row that begins or ends within the window is a window of its own
        edges = sorted({a, b, *(edge for edge in (-(-a // size) * size, b // size * size) if a < edge < b)})
        for low, high in itertools.pairwise(edges):
            first, last = low // size, (high - 1) // size
            block = (
                *self.block[:dim],
                (first, last + 1),
                (low - first * size, high - last * size),
                *self.block[dim + 1 :],
            )
            strides = (*self.strides[:dim], stride * size, stride, *self.strides[dim + 1 :])
            yield replace(self, block=block, strides=strides, offset=self.offset + (low - a) * stride)


@dataclass(frozen=True)
class Moved:
    """A tensor that consists of parts of others."""

    shape: tuple[int, ...]
    windows: tuple[Window, ...]

    def block(self, block: Block) -> Iterator[Window]:
        """The windows of a block, counted from its start."""
        for window in self.windows:
            found: Window | None = window
            for dim, (start, stop) in enumerate(block):
                found = None if found is None else found.within(dim, start, stop)
            if found is not None:
                yield found


def whole(name: str, shape: tuple[int, ...]) -> Moved:
    block = tuple((0, size) for size in shape)
    return Moved(shape, () if 0 in shape else (Window(block, name, 0, row_major(shape)),))


def permute(moved: Moved, dims: Sequence[int]) -> Moved:
    return Moved(
        tuple(moved.shape[dim] for dim in dims),
        tuple(
            replace(w, block=tuple(w.block[dim] for dim in dims), strides=tuple(w.strides[dim] for dim in dims))
            for w in moved.windows
        ),
    )


def narrow(moved: Moved, dim: int, start: int, stop: int, *, step: int = 1) -> Moved:
    size = len(range(start, stop, step))
    found = (window.within(dim, start, stop, step=step) for window in moved.windows)
    shape = (*moved.shape[:dim], size, *moved.shape[dim + 1 :])
    return Moved(shape, tuple(window for window in found if window is not None))


def concatenate(parts: Sequence[Moved], dim: int) -> Moved:
    starts = [0, *itertools.accumulate(part.shape[dim] for part in parts)]
    shape = (*parts[0].shape[:dim], starts[-1], *parts[0].shape[dim + 1 :])
    windows = (w.shifted(dim, start) for part, start in zip(parts, starts, strict=False) for w in part.windows)
    return Moved(shape, tuple(windows))


def reshape(moved: Moved, shape: Sequence[int]) -> Moved:
    windows = list(moved.windows)
    at = 0
    for old, new in _groups(moved.shape, tuple(shape)):
        for number in range(len(old) - 1, 0, -1):  # from the right, so that what fits together is merged first
            size = math.prod(old[number:])
            windows = [joined for window in windows for joined in window.merged(at + number - 1, size)]
        if not old:
            windows = [
                replace(w, block=_inserted(w.block, at, (0, 1)), strides=_inserted(w.strides, at, 0)) for w in windows
            ]
        if not new:  # a dim of 1 goes
            windows = [replace(w, block=_removed(w.block, at), strides=_removed(w.strides, at)) for w in windows]
        for number in range(len(new) - 1):
            size = math.prod(new[number + 1 :])
            windows = [cut for window in windows for cut in window.divided(at + number, size)]
        at += len(new)
    return Moved(tuple(shape), tuple(windows))


def _inserted(row: tuple, at: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*row[:at], value, *row[at:])


def _removed(row: tuple, at: int) -> tuple:  # type: ignore[type-arg]
    return (*row[:at], *row[at + 1 :])


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Runs of dims that hold the same elements before and after, as short as they can be."""
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        before = after = 1
        if i < len(old) and j < len(new):
            before, after, i, j = old[i], new[j], i + 1, j + 1
            while before != after:
                if before < after:
                    before, i = before * old[i], i + 1
                else:
                    after, j = after * new[j], j + 1
        elif i < len(old):  # all that is left over has 1 index
            i += 1
        else:
            j += 1
        yield old[start_i:i], new[start_j:j]


def piece(window: Window, shape: tuple[int, ...], starts: Sequence[int]) -> Piece:
    """To be read from a tensor of `shape`, into a block that begins at `starts`."""
    destination = tuple((low + start, high + start) for (low, high), start in zip(window.block, starts, strict=True))
    box = _box(window, shape)
    plain = Piece(window.tensor, box, destination)
    if _in_order(window, shape, box):
        return plain
    return replace(plain, offset=window.offset, strides=window.strides)


def _box(window: Window, shape: tuple[int, ...]) -> Block:
    """A block of the stored tensor that the window lies in, the smallest one where it has straight edges."""
    counts = extents(window.block)
    first = unravel(window.offset, shape)
    moved = [0] * len(shape)
    for count, stride in zip(counts, window.strides, strict=True):
        if count > 1:
            moved = [m + (count - 1) * digit for m, digit in zip(moved, unravel(stride, shape), strict=True)]
    box = tuple((low, low + by + 1) for low, by in zip(first, moved, strict=True))
    if all(stop <= size for (_, stop), size in zip(box, shape, strict=True)):
        return box
    return tuple((0, size) for size in shape)


def _in_order(window: Window, shape: tuple[int, ...], box: Block) -> bool:
    """Whether the elements are those of the box, in order."""
    counts = [(n, stride) for n, stride in zip(extents(window.block), window.strides, strict=True) if n > 1]
    own = [(n, stride) for n, stride in zip(extents(box), row_major(shape), strict=True) if n > 1]
    return counts == own
