"""The memory of states: as their numbers, or keys and values as float8 with scales.

    float8 = False   {name: [.., D]}                                   in the state's dtype
    float8 = True    {name: codes uint8 [.., D], name.scales: [.., n]}  see `runtime.ops.kernels.float8_rows`

Zeros take no memory before they are written to: `torch.zeros` writes all of it at once.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from runtime.ops.kernels.float8_rows import from_float8, num_scales, to_float8
from runtime.program.shards import StateShard

__all__ = ["StateRows", "buffers_of", "kept_as", "parts_of", "read_from", "shape_of", "untouched_zeros"]

_LEAST_BYTES = 1 << 20
"""Below this, pages cost more than they save."""


def untouched_zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU, the system maps their pages when they are first written to."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LEAST_BYTES:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError):  # more than there may be: torch says it in its own way
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def parts_of(state: StateShard) -> tuple[str, ...]:
    """The names of its buffers."""
    return (state.name, f"{state.name}.scales") if state.float8 else (state.name,)


def shape_of(state: StateShard, max_batch: int, slots: int) -> tuple[int, ...]:
    """Of all its numbers, in a cache of rows."""
    return (max_batch, *state.shape[:-1], slots, state.shape[-1]) if state.per_token else (max_batch, *state.shape)


def buffers_of(state: StateShard, shape: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Zeros. shape: of all its numbers."""
    if not state.float8:
        return {state.name: untouched_zeros(shape, dtype=state.dtype, device=device)}
    codes, scales = parts_of(state)
    of_scales = (*shape[:-1], num_scales(shape[-1]))
    return {
        codes: untouched_zeros(shape, dtype=torch.uint8, device=device),
        scales: untouched_zeros(of_scales, dtype=torch.float32, device=device),
    }


def kept_as(state: StateShard, rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """What goes into each buffer, and the rows as they will be read."""
    if not state.float8:
        return (rows,), rows
    parts = to_float8(rows)
    return parts, from_float8(*parts, rows.dtype)


def read_from(state: StateShard, read: Callable[[str], Tensor]) -> Tensor:
    """The numbers of a state. read: of one of its buffers."""
    found = [read(name) for name in parts_of(state)]
    return from_float8(found[0], found[1], state.dtype) if state.float8 else found[0]


class StateRows:
    """What is kept of tokens by one state, [max_batch, G, slots + 1, D]: the last slot is of what nobody reads.

    buffers: by name, those that the cache has now.
    """

    def __init__(self, state: StateShard, buffers: Callable[[], Mapping[str, Tensor]]) -> None:
        self.state, self._buffers = state, buffers

    @property
    def numbers(self) -> Tensor:
        """As they lie, where they are no codes."""
        return self._buffers()[self.state.name]

    @property
    def slots(self) -> int:
        return self.numbers.shape[2] - 1

    @property
    def width(self) -> int:
        return self.state.shape[-1]

    @property
    def row_bytes(self) -> int:
        """Of one token and head."""
        return self.state.bytes // self.state.shape[0]

    def put(self, rows: slice, slots: slice | Tensor, x: Tensor) -> Tensor:
        """Keeps x [B, G, S, D] in the same slots of all rows, or in those of each, [B, S]; as it will be read."""
        parts, kept = kept_as(self.state, x)
        numbers = torch.arange(rows.start, rows.stop, device=x.device)[:, None]
        for name, part in zip(parts_of(self.state), parts, strict=True):
            if isinstance(slots, slice):
                self._buffers()[name][rows, :, slots] = part
            else:
                self._buffers()[name][numbers, :, slots] = part.transpose(1, 2)
        return kept

    def packed(self, rows: slice, seen: int) -> Tensor:
        """The first `seen` slots as they travel: as they lie, scales as bytes behind their codes."""
        parts = [self._buffers()[name][rows, :, :seen] for name in parts_of(self.state)]
        if not self.state.float8:
            return parts[0]
        return torch.cat([parts[0], parts[1].contiguous().view(torch.uint8)], -1)

    @property
    def packed_width(self) -> int:
        return self.row_bytes if self.state.float8 else self.width

    def unpacked(self, message: Tensor) -> Tensor:
        """The numbers of what has travelled."""
        if not self.state.float8:
            return message
        codes, scales = message[..., : self.width], message[..., self.width :].contiguous()
        return from_float8(codes, scales.view(torch.float32), self.state.dtype)

    def read(self, rows: slice, seen: int) -> Tensor:
        return read_from(self.state, lambda name: self._buffers()[name][rows, :, :seen])
