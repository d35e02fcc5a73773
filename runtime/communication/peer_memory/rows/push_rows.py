"""Rows of tensors that a rank writes straight to where they belong in the others' memory: no buffer of pieces between.

    rows = channel.peer_rows()                     None: these ranks do not write into each other's memory
    rows.require(sizes)                            collective: two areas of so many bytes in the memory of every rank
    rows.write(table, (q, k, v), height)           see `push_rows_kernel.py`; nobody waits
    rows.meet()                                    behind it what the others have written before theirs is here

An area is used again and again, and no kernel asks whether it has been read. So the two take turns: a rank that meets
the others behind the second has read the first, as all have who meet it there, and the first may be written again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.communication.group_collectives import Group
from runtime.communication.peer_memory.choice import Way
from runtime.communication.peer_memory.mapped_memory import Exchange, first_obstacle, mapped
from runtime.ops.rows.row_moves import ALIGNED, Move

__all__ = ["PeerRows"]

_log = logging.getLogger("partitioner")
_ROUND_TO = 1 << 26
_TILE, _WARPS, _PER_PROCESSOR = 64, 8, 4
_TABLES = 64


class Peers(Protocol):
    """Of `PeerMemory`, what is used here."""

    @property
    def group(self) -> Group: ...

    @property
    def device(self) -> torch.device: ...

    def all_reduce(self, x: Tensor, out: Tensor, way: Way) -> Tensor: ...


class PeerRows:
    """One rank's end; see the module's docstring."""

    def __init__(self, peers: Peers, name: str, exchange: Exchange) -> None:
        """peers: the `PeerMemory` whose ranks these are."""
        self._peers, self._name, self._exchange = peers, name, exchange
        self.memory = torch.empty(0, dtype=torch.uint8, device=peers.device)
        self.second = 0
        """Where the second area begins."""
        self._handle: Any = None
        self._starts: Tensor | None = None
        self._is_refused, self._generation = False, 0
        self._is_captured, self._kept = False, list[Any]()
        """What captured graphs read, which may be replayed when the areas have grown."""
        self._tables: dict[Hashable, Tensor] = {}
        device = peers.device
        self._word = torch.zeros(ALIGNED, dtype=torch.int32, device=device)
        self._met = torch.zeros_like(self._word)

    def require(self, sizes: tuple[int, int]) -> bool:
        """A collective, where an area must grow: all ranks ask for the same. False: it cannot be had."""
        if sizes[0] <= self.second and self.second + sizes[1] <= self.memory.numel():
            return True
        if self._is_refused or torch.cuda.is_current_stream_capturing():
            return False
        device = self._peers.device
        torch.cuda.synchronize(device)  # nobody reads or writes the old one any more
        if self._is_captured:
            self._kept.append((self.memory, self._handle))
            self._is_captured = False
        self._handle = self._starts = None
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._generation, self.second = self._generation + 1, 0
        first, last = (-(-size // _ROUND_TO) * _ROUND_TO for size in sizes)
        why, size = "", first + last
        try:
            self.memory, self._handle = mapped(
                self._peers.group, device, f"{self._name} rows {self._generation}", num_bytes=size
            )
        except RuntimeError as error:
            why = f"{size >> 20} MiB that others write into: {str(error).partition(chr(10))[0]}"
        if why := first_obstacle(self._peers.group.ranks, self._exchange({"why": why})):
            _log.warning("rows are exchanged through small buffers: %s", why)
            self.memory, self._handle, self._is_refused = self.memory[:0], None, True
            return False
        self.second = first
        offset = self.memory.data_ptr() - self._handle.buffer_ptrs[self._peers.group.coordinate]
        self._starts = torch.tensor([start + offset for start in self._handle.buffer_ptrs], device=device)
        return True

    def table(self, key: Hashable, moves: Callable[[], Sequence[Move]]) -> Tensor:
        """On the device, and kept there for the next ones with this key."""
        found = self._tables.pop(key, None)
        if found is None:
            found = torch.tensor([each.fields() for each in moves()], dtype=torch.int64, device=self._peers.device)
            if len(self._tables) == _TABLES:
                del self._tables[next(iter(self._tables))]
        self._tables[key] = found
        return found

    def write(self, table: Tensor, sources: Sequence[Tensor], height: int, *, own: Tensor | None = None) -> None:
        """sources: up to three, each `loadable`. height: rows of the longest move. own: where this rank's ones go."""
        from runtime.communication.peer_memory.rows.push_rows_kernel import (
            FIELDS,
            write_rows,
        )  # Triton comes with GPUs only

        if not len(table) or not height or not sources[0].shape[0]:
            return
        width = max(x.shape[-1] * x.element_size() for x in sources)
        given: list[int] = []
        for x in (*sources, *[sources[-1]] * (3 - len(sources))):
            given += [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])]
        batches, tiles = sources[0].shape[0], -(-height // _TILE)
        items = len(table) * batches * tiles
        processors = torch.cuda.get_device_properties(self._peers.device).multi_processor_count
        write_rows[(min(items, processors * _PER_PROCESSOR),)](
            table, self._starts, (self.memory if own is None else own).data_ptr(), *given, items, batches, tiles,
            RANK=self._peers.group.coordinate, FIELDS=FIELDS, WORDS=1 << (width // 4 - 1).bit_length(), ROWS=_TILE,
            num_warps=_WARPS,
        )  # fmt: skip

    def of(self, coordinate: int, start: int, size: int, dtype: torch.dtype) -> Tensor:
        """So many elements from a byte of the areas of one rank on, as this one has them mapped."""
        self._is_captured |= torch.cuda.is_current_stream_capturing()
        if coordinate == self._peers.group.coordinate:
            return self.memory[start:][: size * dtype.itemsize].view(dtype)
        first = self.memory.data_ptr() - self._handle.buffer_ptrs[self._peers.group.coordinate] + start
        found: Tensor = self._handle.get_buffer(coordinate, (size,), dtype, first // dtype.itemsize)
        return found

    def meet(self) -> None:
        """On the stream: what every rank has written before its own is there."""
        self._peers.all_reduce(self._word, self._met, "large")

    def close(self) -> None:
        self._handle = self._starts = None
        self._kept.clear()
