"""How ranks find each other at the start, without any wait that a lost rank could make unbounded.

    meet_at_store(rank, ..)   the key-value store that torchrun hosts; without torchrun's, rank 0 does
    watched(work, ..)         work(), given up as soon as another rank is lost

torch.distributed's own start waits in C++ until its timeout, whatever happens to the others: so it runs in a thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch.distributed import Store, TCPStore

from partitioner.errors import RankLost
from runtime.peers import Peers

__all__ = ["meet_at_store", "watched"]

T = TypeVar("T")
_POLL_S = 0.005
_SPARE_S = 0.3
"""Beyond the deadline, for what is waited for to say itself what is missing."""


def meet_at_store(rank: int, *, timeout_s: float) -> Store:
    """As torch.distributed's "env://", but rank 0 does not wait for the others here: it could not say who is late."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = rank == 0 and not by_launcher
    try:
        return TCPStore(
            host,
            port,
            is_master=is_host,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        who = "this rank cannot host a store" if is_host else "nobody answers"
        whose = "" if is_host else ", the launcher's store" if by_launcher else ": rank 0 did not come"
        raise RankLost(f"{who} at {host}:{port}{whose} ({str(error).partition(chr(10))[0]})") from error


def watched(work: Callable[[], T], *, timeout_s: float, peers: Peers | None = None) -> T:
    """What `work` returns or raises; RuntimeError as soon as a rank is lost, or silent for `timeout_s`.

    Before the ranks know each other (`peers` is None): RankLost after `timeout_s`.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="join the other ranks")
    deadline = time.monotonic() + timeout_s + _SPARE_S
    thread.start()
    while True:
        thread.join(_POLL_S)
        if results:
            return results[0]
        if errors:
            raise errors[0]
        if peers is None:
            if time.monotonic() > deadline:
                raise RankLost("rank 0 has stopped answering")
        elif peers.lost():
            raise RuntimeError("connection lost")
        elif any(peers.silent_s(rank) > timeout_s for rank in range(peers.num_ranks) if rank != peers.rank):
            raise RuntimeError(f"timed out after {timeout_s:g} s")
