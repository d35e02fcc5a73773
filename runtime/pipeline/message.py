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
from dataclasses import dataclass

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.program.rank_program import Crossing

__all__ = ["Box", "Message", "message_bytes"]

_ALIGNED = 16


@dataclass(frozen=True)
class Message:
    """See the module's docstring. values: empty where the group does not run."""

    step: int = 0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] | None = None
    values: tuple[Tensor, ...] = ()

    def pack(self, size: int, rows: int, device: torch.device) -> Tensor:
        """`size` bytes; rows: how many there is room for."""
        packed = torch.empty(size, dtype=torch.uint8, device=device)
        head = _head(rows)
        # a message is written and read in each slot of a ring, where others wait for it: as few ops of torch as can be
        on_host = device.type == "cpu"
        host = packed.numpy() if on_host else torch.empty(head.size, dtype=torch.uint8).numpy()
        filler = (0,) * (rows - len(self.tokens))
        scores = (math.nan,) * rows
        if self.logprobs is not None:
            scores = (*self.logprobs, *scores[len(self.logprobs) :])
        head.pack_into(host.data, 0, self.step, len(self.values), *self.tokens, *filler, *scores)
        if not on_host:
            packed[: head.size] = torch.from_numpy(host).to(device)
        at = _aligned(head.size)
        for value in self.values:
            assert at + value.nbytes <= size, "a message is as long as the longest"
            if on_host:
                value = value.contiguous()
                ctypes.memmove(packed.data_ptr() + at, value.data_ptr(), value.nbytes)
            else:
                packed[at : at + value.nbytes].view(value.dtype).view(value.shape).copy_(value)
            at = _aligned(at + value.nbytes)
        return packed

    @classmethod
    def unpack(cls, packed: Tensor, rows: int, *, count: int, crossings: Sequence[Crossing], scored: bool) -> Message:
        """count: how many rows the group has. crossings: what the stage before hands on; values: parts of `packed`."""
        head = _head(rows)
        on_host = packed.device.type == "cpu"
        host = (packed if on_host else packed[: head.size].cpu()).numpy()
        step, has_values, *numbers = head.unpack_from(host.data)
        at, values = _aligned(head.size), []
        for crossing in crossings if has_values else ():
            shape = _shape(crossing, count)
            numel = math.prod(shape)
            size = numel * crossing.dtype.itemsize
            if on_host and size:
                value = torch.frombuffer(host, dtype=crossing.dtype, count=numel, offset=at)
            else:
                value = packed[at : at + size].view(crossing.dtype)
            values.append(value.view(shape))
            at = _aligned(at + size)
        scores = tuple(numbers[rows : rows + count]) if scored else None
        return cls(step, tuple(numbers[:count]), scores, tuple(values))


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
