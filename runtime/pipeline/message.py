"""What decoding stages hand on: one message of fixed size per slot of a ring, or per turn of a relay.

    number     step of the tokens, 0: none; whether values follow                  2 x int64
    tokens     those that the group was given last                                 rows x int64
    logprobs   of these, NaN where nobody asked                                    rows x float64
    values     what the stage hands on, each from a multiple of 16 bytes

All ranks of a permute bring tensors of one shape, so a message is as long as the longest boundary and group need. In a
relay the device writes and reads messages, each in memory that stays (`Box`):

    said       the tokens that the group was given last, and their logits          [2, rows] x float64
    values     what the stage hands on, each from a multiple of 16 bytes
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.program.rank_program import Crossing

__all__ = ["Box", "Message", "MessageReader", "MessageWriter", "message_bytes"]

_ALIGNED = 16
_MOST_PLACES = 4
"""Of messages, whose memory is kept: two that come by turns, for groups of two sizes."""


class Message(NamedTuple):
    """See the module's docstring. values: empty where the group does not run."""

    step: int = 0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    values: tuple[Tensor, ...] = ()


class MessageWriter:
    """Writes messages of up to `size` bytes and `rows` rows to `packed`, memory that stays.

    A message is written and read in each slot of a ring, where others wait for it, by code that the weights of a step
    have driven out of the processor's caches: as little of it as can be.
    """

    def __init__(self, size: int, rows: int, device: torch.device) -> None:
        self.packed = torch.zeros(size, dtype=torch.uint8, device=device)
        self._rows, self._head, self._device = rows, _head(rows), device
        self._on_host = device.type == "cpu"
        self._host = (self.packed if self._on_host else torch.empty(self._head.size, dtype=torch.uint8)).numpy().data
        self._place, self._start = self.packed.data_ptr(), _aligned(self._head.size)
        self._no_scores = (math.nan,) * rows

    def write(
        self, step: int, tokens: Sequence[int], logprobs: Sequence[float] | None, values: Sequence[Tensor]
    ) -> None:
        filler = (0,) * (self._rows - len(tokens))
        scores = self._no_scores if logprobs is None else (*logprobs, *self._no_scores[len(logprobs) :])
        self._head.pack_into(self._host, 0, step, len(values), *tokens, *filler, *scores)
        packed, at = self.packed, self._start
        if not self._on_host:
            packed[: self._head.size] = torch.frombuffer(self._host, dtype=torch.uint8).to(self._device)
        for value in values:
            end = at + value.nbytes
            assert end <= len(packed), "a message is as long as the longest"
            if self._on_host:
                value = value.contiguous()
                ctypes.memmove(self._place + at, value.data_ptr(), value.nbytes)
            else:
                packed[at:end].view(value.dtype).view(value.shape).copy_(value)
            at = _aligned(end)


class MessageReader:
    """Reads what a `MessageWriter` of `rows` rows has written. crossings: what the stage before hands on."""

    def __init__(self, rows: int, crossings: Sequence[Crossing], *, scored: bool) -> None:
        self._rows, self._crossings, self._scored, self._head = rows, crossings, scored, _head(rows)
        self._views: dict[tuple[int, int], tuple[Tensor, Any, tuple[Tensor, ...]]] = {}
        """Of messages that lie where one lay before, on the host: their bytes, and their values."""

    def read(self, packed: Tensor, count: int) -> Message:
        """count: how many rows the group has. values: parts of `packed`."""
        found = self._views.get((id(packed), count))
        if found is None:
            found = self._found(packed, count)
        _, host, values = found
        step, has_values, *numbers = self._head.unpack_from(host)
        scores = tuple(numbers[self._rows : self._rows + count]) if self._scored else None
        return Message(step, tuple(numbers[:count]), scores, values if has_values else ())

    def _found(self, packed: Tensor, count: int) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
        on_host, at, values = packed.device.type == "cpu", _aligned(self._head.size), list[Tensor]()
        for crossing in self._crossings:
            shape = _shape(crossing, count)
            size = math.prod(shape) * crossing.dtype.itemsize
            values.append(packed[at : at + size].view(crossing.dtype).view(shape))
            at = _aligned(at + size)
        host = packed if on_host else packed[: self._head.size].cpu()
        found = packed, host.numpy().data, tuple(values)
        if on_host:
            if len(self._views) >= _MOST_PLACES:
                self._views.clear()
            self._views[id(packed), count] = found
        return found


class Box:
    """Memory of one message of a relay, of a group of `rows`; said, values: parts of `packed`."""

    def __init__(self, crossings: Sequence[Crossing], rows: int, device: torch.device) -> None:
        shapes = [_shape(crossing, rows) for crossing in crossings]
        sizes = [math.prod(shape) * each.dtype.itemsize for shape, each in zip(shapes, crossings, strict=True)]
        starts = [_aligned(16 * rows)]
        for size in sizes:
            starts.append(_aligned(starts[-1] + size))
        self.packed = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
        self.said = self.packed[: 16 * rows].view(torch.float64).view(2, rows)
        parts = zip(crossings, shapes, starts, sizes, strict=False)
        self.values = tuple(
            self.packed[start : start + size].view(each.dtype).view(shape) for each, shape, start, size in parts
        )


def message_bytes(crossings: Sequence[Crossing], rows: int) -> int:
    """How long the messages of a stage are that hands these on."""
    size = _aligned(_head(rows).size)
    for crossing in crossings:
        size = _aligned(size + math.prod(_shape(crossing, rows)) * crossing.dtype.itemsize)
    return size


@functools.cache
def _head(rows: int) -> struct.Struct:
    """What comes before the values; see the module's docstring."""
    return struct.Struct(f"=2q{rows}q{rows}d")


def _aligned(at: int) -> int:
    return -(-at // _ALIGNED) * _ALIGNED


def _shape(crossing: Crossing, rows: int) -> list[int]:
    if crossing.rows:
        raise InputError(f"what crosses at {crossing.name!r} is shared out over ranks: it cannot go round a ring")
    sizes = {"batch": rows, "sequence": 1}
    for dim in crossing.shape:
        if isinstance(dim, str) and dim not in sizes:
            raise InputError(f"what crosses at {crossing.name!r} grows with the {dim}: it cannot go round a ring")
    return [sizes[dim] if isinstance(dim, str) else dim for dim in crossing.shape]
