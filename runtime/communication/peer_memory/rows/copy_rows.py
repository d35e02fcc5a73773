"""Large pieces that the GPU's copy engines write into the others' memory: whoever computes keeps all processors.

    gather(x)    x[m, ..]    ->  [n m, ..]   every rank's piece, in order of coordinate
    scatter(x)   x[n m, ..]  ->  [m, ..]     the sum of every rank's piece for this one

Ranks meet when they begin: who is there has read what came the last time. Then copies run beside what the rank computes
next, and no kernel does: one that has to wait for a processor until a product ends would hide nothing. When the rank
needs what comes, its own copies have ended, and the ranks meet again: all have, then. What is gathered stands in memory
that the next gather writes: it must have been read when that begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime.communication.channels import Handle
from runtime.communication.peer_memory.rows.push_rows import PeerRows

__all__ = ["PeerCopies"]

_MOST_BYTES = 1 << 29


class PeerCopies:
    """One rank's end; see the module's docstring."""

    def __init__(self, peers: Any, rows: PeerRows) -> None:
        """peers: the `PeerMemory` whose ranks these are. rows: whose areas are used, by nobody else: the first for what
        is gathered, the second for what is scattered.
        """
        self.num_ranks: int = peers.group.size
        self._peers, self._rows, self._sizes = peers, rows, (0, 0)

    def has_room(self, num_bytes: int, *, scatters: bool) -> bool:
        """For the pieces of all ranks; a collective, where an area must grow: all ranks bring as much."""
        if num_bytes > _MOST_BYTES:
            return False
        first, second = self._sizes
        wanted = (first, max(second, num_bytes)) if scatters else (max(first, num_bytes), second)
        if self._rows.require(wanted):
            self._sizes = wanted
            return True
        return False

    def gather(self, x: Tensor) -> Handle:
        """x: contiguous."""
        own, size = self._peers.group.coordinate, x.numel()
        into = self._rows.of(own, 0, self.num_ranks * size, x.dtype)
        sources = [x.view(-1)] * self.num_ranks
        return self._begin(sources, 0, own * size, into.view(-1, *x.shape[1:]), None)

    def scatter(self, x: Tensor) -> Handle:
        """x: contiguous. Sums are taken in float32 at least, and rounded once."""
        own, pieces = self._peers.group.coordinate, x.view(self.num_ranks, -1)
        into = x.new_empty((x.shape[0] // self.num_ranks, *x.shape[1:]))
        came = self._rows.of(own, self._rows.second, x.numel(), x.dtype).view(self.num_ranks, -1)
        at = own * pieces.shape[1]
        return self._begin(list(pieces.unbind(0)), self._rows.second, at, into, (pieces[own], came))

    def close(self) -> None:
        self._rows.close()

    def _begin(
        self, sources: list[Tensor], area: int, at: int, into: Tensor, summed: tuple[Tensor, Tensor] | None
    ) -> Handle:
        """Of what stands at `area`, the elements from `at` on are this rank's to write, in the memory of each rank.

        summed: the rank's own piece, and where all others' come.
        """
        own, size, dtype = self._peers.group.coordinate, sources[0].numel(), sources[0].dtype
        start, kept = area + at * dtype.itemsize, list(sources)

        def copy() -> None:
            for step in range(1, self.num_ranks):  # the next one first, so that not all write to one
                other = (own + step) % self.num_ranks
                self._rows.of(other, start, size, dtype).copy_(sources[other])
            if summed is None or self.num_ranks > 2:
                self._rows.of(own, start, size, dtype).copy_(sources[own])

        self._meet()
        end = self._peers.side_stream.begin(copy)

        def finish() -> Tensor:
            self._peers.side_stream.finish(end)
            self._meet()
            if summed is not None and self.num_ranks == 2:
                torch.add(summed[0], summed[1][1 - own], out=into.view(-1))
            elif summed is not None:
                torch.sum(summed[1], 0, out=into.view(-1))
            kept.clear()
            return into

        return Handle(finish, into=into)

    def _meet(self) -> None:
        """On the stream: what every rank has done before its own is done."""
        self._peers.side_stream.wait()  # sums by rows meet by the same flags, on that stream
        self._peers.row_sums.meet()
