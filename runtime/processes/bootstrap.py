"""How ranks find each other at the start, without any wait that a lost rank could make unbounded.

    bootstrap(number, place, ..) the key-value store at which all ranks meet, and the others of this replica
    watched(work, ..)           work(), given up as soon as another rank is lost
    WatchedStore(store, peers)  so that work which waits at the store ends then, too

The store is memory that our launcher (`launch.py`) lets all ranks inherit: nobody else can come to it. Under torchrun
it is torchrun's, and without any launcher rank 0's, which listens where MASTER_ADDR says: who reaches it is believed.

torch.distributed's own start waits in C++ until its timeout, whatever happens to the others: so it runs in a thread. A
thread that is still in C++ when the interpreter ends may take the process down: so it is given a way out.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

from torch import distributed as dist
from torch._C._distributed_c10d import FileStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from partitioner.errors import RankLost
from runtime.processes.authenticated_links import listen_at
from runtime.processes.heartbeat import Heartbeat
from runtime.processes.place import LOCAL_STORE, Place

__all__ = ["WatchedStore", "bootstrap", "watched"]

T = TypeVar("T")
_POLL_S = 0.005
_SPARE_S = 0.3
"""Beyond the deadline, for what is waited for to say itself what is missing."""


def bootstrap(number: int, place: Place, timeout_s: float) -> tuple[Store, Heartbeat]:
    """All ranks of a replica together, for the `number`-th time."""
    deadline = time.monotonic() + timeout_s
    is_local = LOCAL_STORE in os.environ
    is_first = place.rank == place.replica == 0
    store = _local_store(timeout_s=timeout_s) if is_local else _store(is_first, timeout_s=timeout_s)
    left_s = max(0.1, deadline - time.monotonic())
    own = PrefixStore(f"peers/{number}" + (f"/{place.replica}" if place.replicas > 1 else ""), store)
    ranks = place.mesh.world_size
    heartbeat = Heartbeat.connect(own, place.host, place.rank, ranks, timeout_s=left_s, names=place.names)
    return store, heartbeat


def _local_store(*, timeout_s: float) -> Store:
    store = FileStore(os.environ[LOCAL_STORE], -1)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _store(is_first: bool, *, timeout_s: float) -> Store:
    """As torch.distributed's "env://", but rank 0 does not wait for the others here: it could not say who is late."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = is_first and not by_launcher
    deadline = time.monotonic() + timeout_s
    while not is_host:
        # the store's own client would log each attempt, and go on after its timeout
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                who = "the launcher's store is gone" if by_launcher else "rank 0 did not come"
                raise RankLost(f"{who}: nobody answers at {host}:{port} ({error})") from error
        time.sleep(0.02)
    try:
        # torch's own would listen on every interface
        listener = None
        if is_host:
            try:
                listener = listen_at(host, port)
                port = listener.getsockname()[1]
            except OSError as error:
                if error.errno != errno.EADDRINUSE:  # by this process itself, for an earlier meeting: that one is taken
                    raise
        return TCPStore(
            host,
            port,
            is_master=is_host,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except (RuntimeError, OSError) as error:
        who = "rank 0 cannot host a store" if is_host else "no store answers"
        raise RankLost(f"{who} at {host}:{port} ({str(error).partition(chr(10))[0]})") from error


class WatchedStore(Store):
    """A store at which nobody waits for a rank that is lost."""

    def __init__(self, store: Store, heartbeat: Heartbeat, *, timeout_s: float) -> None:
        super().__init__()
        self._store, self._heartbeat, self._timeout_s = store, heartbeat, timeout_s

    def set(self, key: str, value: bytes | str) -> None:
        self._store.set(key, value)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._store.get(key)

    def add(self, key: str, value: int) -> int:
        return self._store.add(key, value)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        deadline = time.monotonic() + (self._timeout_s if timeout is None else timeout.total_seconds())
        pause_s = 0.001
        while not self._store.check(keys):
            if not self._heartbeat.is_well:
                raise dist.DistNetworkError("connection lost")
            if time.monotonic() > deadline:
                raise dist.DistNetworkError(f"timed out, waiting for {', '.join(keys)}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.1)  # many ranks ask one store


def watched(work: Callable[[], T], *, timeout_s: float, heartbeat: Heartbeat | None = None) -> T:
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
    while not results and not errors:
        thread.join(_POLL_S)
        why = None
        if heartbeat is None:
            if time.monotonic() > deadline:
                raise RankLost("rank 0 has stopped answering")
        elif not heartbeat.is_well:
            why = "connection lost"
        elif any(heartbeat.silent_s(rank) > timeout_s for rank in range(heartbeat.num_ranks) if rank != heartbeat.rank):
            why = f"timed out after {timeout_s:g} s"
        if why is not None:
            thread.join(_SPARE_S)
            raise RuntimeError(why)
    if errors:
        raise errors[0]
    return results[0]
