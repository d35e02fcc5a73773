"""Ranks as threads, each with a function of its own."""

import threading
from collections.abc import Callable

from runtime.communication.thread_communicator import ThreadCommunicator, ThreadGroup


def run(group: ThreadGroup, *ranks: Callable[[ThreadCommunicator], object]) -> list[object]:
    """Each function in a thread of its own; its result, or its exception."""
    results: list[object] = [None] * len(ranks)

    def body(rank: int) -> None:
        try:
            results[rank] = ranks[rank](group.communicator(rank))
        except Exception as error:
            results[rank] = error
            group.abort(rank, error)
        finally:
            group.end(rank)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results
