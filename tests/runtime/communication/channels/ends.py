"""The channels of ranks that are threads of one process, through the memory that processes share."""

import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from runtime.communication.failure_verdict import FailureVerdict
from runtime.communication.group_channel import GroupChannel, RankState
from runtime.communication.group_collectives import Group
from runtime.communication.shared_memory.segment import Segment
from runtime.communication.shared_memory.shared_memory import SharedMemory, _library

__all__ = ["channels", "in_threads"]


def channels(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch, *, timeout_s: float = 20.0, slot_bytes: int = 1 << 12
) -> list[GroupChannel]:
    """Of every rank. Locks of a process do not tell its threads apart: all count as alive."""
    monkeypatch.setattr(Segment, "is_held", lambda self, index: True)
    native, ranks = _library(60.0), tuple(range(num_ranks))
    segment = SharedMemory.segment(native, num_ranks, slot_bytes=slot_bytes)
    found = []
    for rank in ranks:
        state = RankState(rank, torch.device("cpu"), FailureVerdict(None, rank, timeout_s=timeout_s))
        shared = SharedMemory(native, segment, ranks, rank, slot_bytes=slot_bytes, timeout_s=timeout_s)
        no_group = Group(None, ranks, rank, is_nccl=False)  # type: ignore[arg-type]
        found.append(GroupChannel(("tp",), no_group, state, shared, node="n"))
    return found


def in_threads(ranks: Sequence[GroupChannel], run: Callable[[GroupChannel], object]) -> list[object]:
    """What each yields, or raises."""
    results: list[object] = [None] * len(ranks)

    def body(rank: int) -> None:
        try:
            results[rank] = run(ranks[rank])
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results
