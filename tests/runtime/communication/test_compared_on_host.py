"""Ranks with GPUs compare on the host: what is said, what a rank that does not come means, what is left behind."""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import distributed as dist

from partitioner.errors import RankLost, RankMismatch
from runtime.communication.exchange import StoreGather
from runtime.communication.failure_verdict import FailureVerdict
from runtime.communication.group_channel import GroupChannel, RankState
from runtime.communication.group_collectives import Group
from runtime.processes.bootstrap import WatchedStore
from tests.runtime.communication.channels.ends import in_threads


class Beats:
    """Of ranks that are there, until somebody says otherwise."""

    is_well = True


def gathers(num_ranks: int, *, timeout_s: float = 20.0, beats: Any = None) -> list[StoreGather]:
    store, ranks = dist.HashStore(), tuple(range(num_ranks))
    return [StoreGather(WatchedStore(store, beats or Beats(), timeout_s=timeout_s), ranks, rank) for rank in ranks]


def channels(num_ranks: int, *, timeout_s: float = 20.0, beats: Any = None) -> list[GroupChannel]:
    ranks, found = tuple(range(num_ranks)), []
    for rank, on_host in enumerate(gathers(num_ranks, timeout_s=timeout_s, beats=beats)):
        group = Group(None, ranks, rank, True, on_host)  # type: ignore[arg-type]
        state = RankState(rank, torch.device("cpu"), FailureVerdict(None, rank, timeout_s=timeout_s), checking=True)
        found.append(GroupChannel(("tp",), group, state, None, node="n"))
        found[-1]._primitive = lambda *args, **options: lambda x, *counts: x  # type: ignore[method-assign]
    return found


def together(calls: Sequence[Callable[[], object]]) -> list[object]:
    said: list[object] = [None] * len(calls)

    def body(place: int) -> None:
        said[place] = calls[place]()

    threads = [threading.Thread(target=body, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_all_hear_all_and_little_stays(num_ranks: int) -> None:
    ranks = gathers(num_ranks)
    for number in range(5):
        mine = [f"{number} of {rank}".encode() for rank in range(num_ranks)]
        said = together([partial(each.gather, own) for each, own in zip(ranks, mine, strict=True)])
        assert said == [mine] * num_ranks
    assert ranks[0]._store._store.num_keys() == num_ranks


def test_two_of_a_group_talk_beside_it() -> None:
    ranks = gathers(3)
    assert (
        together([lambda: ranks[0].gather(b"a", (0, 2)), lambda: ranks[2].gather(b"c", (0, 2))]) == [[b"a", b"c"]] * 2
    )
    assert together([lambda rank=rank: rank.gather(b"x") for rank in ranks]) == [[b"x"] * 3] * 3  # type: ignore[misc]


def test_ranks_that_agree_go_on() -> None:
    ranks = channels(3)
    assert in_threads(ranks, lambda rank: rank.prepare("all_reduce")(torch.ones(4)).tolist()) == [[1.0] * 4] * 3


def test_ranks_that_disagree_say_so() -> None:
    ranks = channels(2)
    said = in_threads(ranks, lambda rank: rank.prepare("all_reduce")(torch.ones(4 + rank.rank)))
    assert [type(each) for each in said] == [RankMismatch] * 2, said


def test_counts_that_disagree_are_named() -> None:
    ranks = channels(2)
    said = in_threads(ranks, lambda rank: rank.prepare("all_to_all")(torch.ones(3, 1), [1, 2], [1, 1 + rank.rank]))
    assert [type(each) for each in said] == [RankMismatch] * 2, said


def test_send_and_receive_compare_between_two() -> None:
    """Nothing of the third is needed."""
    ranks = channels(3)

    def run(rank: GroupChannel) -> object:
        if rank.rank == 0:
            return rank.prepare("send", to=1)(torch.ones(4))
        return rank.prepare("receive", from_=0)((5,), torch.float32)

    said = in_threads(ranks[:2], run)
    assert [type(each) for each in said] == [RankMismatch] * 2, said


def test_a_rank_that_does_not_come_is_lost_within_the_timeout() -> None:
    ranks = channels(2, timeout_s=0.3)
    with pytest.raises(RankLost, match="timed out"):
        ranks[0].prepare("all_reduce")(torch.ones(4))


def test_a_rank_whose_process_ends_is_lost_at_once() -> None:
    beats = Beats()
    ranks = channels(2, beats=beats)
    threading.Timer(0.2, lambda: setattr(beats, "is_well", False)).start()
    start = time.monotonic()
    with pytest.raises(RankLost, match="connection lost"):
        ranks[0].prepare("all_reduce")(torch.ones(4))
    assert time.monotonic() - start < 5
