"""Large pieces that the GPU's copy engines bring from the others' memory, so that processors are left to who computes.

    gather(x, out)    x[m, ..]    ->  out[n m, ..]   every rank's piece, in order of coordinate
    scatter(x, out)   x[n m, ..]  ->  out[m, ..]     the sum of every rank's piece for this one

A rank lays what it brings into memory of its own that all have mapped, meets the others, and copies what it needs out
of theirs: copies between GPUs are no kernels. What does not fit goes in parts, one after the other.

No copy asks whether that memory has been read. So ranks meet before a part is laid out, too: who comes there has copied
what the part before it was for. That holds for captured copies, in whatever order they are replayed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.communication.peer_memory.rows.push_rows import PeerRows

__all__ = ["PeerCopies"]

_AREA_BYTES = 1 << 28
_ALIGNED = 256
_WORDS = 16


class PeerCopies:
    """One rank's end; see the module's docstring."""

    def __init__(self, peers: Any, rows: PeerRows) -> None:
        """peers: the `PeerMemory` whose ranks these are. rows: whose first area is used, by nobody else."""
        self.peers, self._rows = peers, rows
        self.num_ranks: int = peers.group.size
        self._word = torch.zeros(_WORDS, dtype=torch.int32, device=peers.device)
        self._met = torch.empty_like(self._word)

    def has_room(self, num_bytes: int) -> bool:
        """A collective, where the area must grow: all ranks bring as much."""
        return self._rows.require((min(num_bytes + _ALIGNED * self.num_ranks, _AREA_BYTES), 0))

    def gather(self, x: Tensor, out: Tensor) -> None:
        """x, out: contiguous."""
        own, whole, pieces = self.peers.group.coordinate, x.view(-1), out.view(self.num_ranks, -1)
        for start, stop in self._parts(x.numel(), x.element_size()):
            size = stop - start
            self._meet()
            self._rows.of(own, 0, size, x.dtype).copy_(whole[start:stop])
            self._meet()
            for other in self._others():
                pieces[other, start:stop].copy_(self._rows.of(other, 0, size, x.dtype))
        pieces[own].copy_(whole)

    def scatter(self, x: Tensor, out: Tensor) -> None:
        """x, out: contiguous. Sums of two are rounded once, others are taken in float32 at least."""
        own, pieces, whole = self.peers.group.coordinate, x.view(self.num_ranks, -1), out.view(-1)
        for start, stop in self._parts(out.numel(), x.element_size() * self.num_ranks):
            size = stop - start
            each = -(-size * x.element_size() // _ALIGNED) * _ALIGNED
            self._meet()
            for other in self._others():
                self._rows.of(own, other * each, size, x.dtype).copy_(pieces[other, start:stop])
            self._meet()
            came = x.new_empty(self.num_ranks, size)
            for other in self._others():
                came[other].copy_(self._rows.of(other, own * each, size, x.dtype))
            if self.num_ranks == 2:
                torch.add(pieces[own, start:stop], came[1 - own], out=whole[start:stop])
            else:
                came[own].copy_(pieces[own, start:stop])
                torch.sum(came, 0, out=whole[start:stop])

    def close(self) -> None:
        self._rows.close()

    def _others(self) -> list[int]:
        """The next one first, so that not all ask one."""
        own, count = self.peers.group.coordinate, self.num_ranks
        return [(own + step) % count for step in range(1, count)]

    def _parts(self, numel: int, item: int) -> list[tuple[int, int]]:
        """Of so many elements, each of which takes so many bytes of an area."""
        most = (_AREA_BYTES - _ALIGNED * self.num_ranks) // item // _ALIGNED * _ALIGNED
        return [(start, min(start + most, numel)) for start in range(0, numel, most)]

    def _meet(self) -> None:
        """On the stream: what every rank has done before its own is done."""
        self.peers.all_reduce(self._word, self._met, "large")
