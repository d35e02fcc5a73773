"""Pieces that ranks copy out of each other's memory: ranks are threads here, which meet at a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.communication.peer_memory.rows.copy_rows import PeerCopies


class Host:
    """The memory of all ranks, of which each has those of the others mapped."""

    def __init__(self, ranks: int, *, meets: bool = True) -> None:
        self.areas = [torch.full((1 << 16,), 255, dtype=torch.uint8) for _ in range(ranks)]
        self.barrier, self.meets = threading.Barrier(ranks), meets

    def end(self, rank: int) -> PeerCopies:
        group = SimpleNamespace(size=len(self.areas), coordinate=rank)
        rows = SimpleNamespace(of=self._of, require=lambda sizes: max(sizes) <= 1 << 15, second=1 << 15)
        side_stream = SimpleNamespace(begin=lambda run: run(), finish=lambda end: None, wait=lambda: None)
        sums = SimpleNamespace(meet=self._meet)
        peers = SimpleNamespace(group=group, device="cpu", row_sums=sums, side_stream=side_stream)
        return PeerCopies(peers, rows)  # type: ignore[arg-type]

    def _of(self, coordinate: int, start: int, size: int, dtype: torch.dtype) -> Tensor:
        return self.areas[coordinate][start:][: size * dtype.itemsize].view(dtype)

    def _meet(self) -> None:
        if self.meets:
            self.barrier.wait(10)


def everybody(host: Host, work: Callable[[PeerCopies, int], Any]) -> list[Any]:
    ranks = range(len(host.areas))
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(lambda rank: work(host.end(rank), rank), ranks))


@pytest.mark.parametrize("ranks", [2, 3])
def test_pieces_are_gathered_and_sums_scattered(ranks: int) -> None:
    own = torch.randn(ranks, 5, 37, dtype=torch.float64)
    whole = torch.randn(ranks, ranks * 5, 37, dtype=torch.float64)

    def work(copies: PeerCopies, rank: int) -> list[Tensor]:
        found = []
        for turn in range(3):  # the memory is used again
            coming = copies.gather(own[rank] + turn)
            found += [coming.finish().clone(), copies.scatter(whole[rank] + turn).finish()]
            assert coming.into is not None
        return found

    for rank, found in enumerate(everybody(Host(ranks), work)):
        for turn in range(3):
            assert torch.equal(found[2 * turn], (own + turn).flatten(0, 1))
            summed = (whole + turn).sum(0)[5 * rank :][:5]
            torch.testing.assert_close(found[2 * turn + 1], summed, rtol=1e-14, atol=1e-14)


def test_room_is_asked_for_both_and_kept() -> None:
    copies = Host(2).end(0)
    assert copies.has_room(1000, scatters=False)
    assert copies.has_room(2000, scatters=True)
    assert copies._sizes == (1000, 2000)
    assert not copies.has_room(1 << 16, scatters=True)
    assert copies._sizes == (1000, 2000)


def test_who_does_not_wait_for_the_others_reads_what_was_there() -> None:
    own, host = torch.randn(2, 64, dtype=torch.float64), Host(2, meets=False)
    assert not torch.equal(host.end(0).gather(own[0]).finish(), own.view(-1))
