"""Ranks with GPUs compare on the host: what is said, what a rank that does not come means, what is left behind."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import distributed as dist

from partitioner.errors import RankLost, RankMismatch
from runtime.communication.failure_verdict import FailureVerdict
from runtime.communication.group_channel import GroupChannel, RankState
from runtime.communication.group_collectives import Group
from runtime.communication.meeting.exchange import HostGather
from runtime.processes.heartbeat import Heartbeat
from tests.runtime.communication.channels.ends import in_threads


@pytest.fixture
def meet() -> Iterator[Callable[[int], list[Heartbeat]]]:
    """Makes the heartbeats of so many ranks, threads of this process."""
    made: list[Heartbeat] = []

    def ranks(num_ranks: int) -> list[Heartbeat]:
        store = dist.HashStore()
        met = together(
            [partial(Heartbeat.connect, store, "", rank, num_ranks, timeout_s=20) for rank in range(num_ranks)]
        )
        made.extend(met)
        return met

    yield ranks
    for each in made:
        each.close()


def channels(heartbeats: list[Heartbeat], *, timeout_s: float = 20.0) -> list[GroupChannel]:
    ranks, found = tuple(range(len(heartbeats))), []
    for rank, heartbeat in enumerate(heartbeats):
        group = Group(None, ranks, rank, True, HostGather(heartbeat, ranks, timeout_s=timeout_s))  # type: ignore[arg-type]
        state = RankState(
            rank, torch.device("cpu"), FailureVerdict(heartbeat, rank, timeout_s=timeout_s), checking=True
        )
        found.append(GroupChannel(("tp",), group, state, None, node="n"))
        found[-1]._primitive = lambda *args, **options: lambda x, *counts: x  # type: ignore[method-assign]
    return found


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    said: list[Any] = [None] * len(calls)

    def body(place: int) -> None:
        said[place] = calls[place]()

    threads = [threading.Thread(target=body, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


Meet = Callable[[int], list[Heartbeat]]


@pytest.mark.parametrize(("num_ranks", "size"), [(2, 3), (3, 5), (3, 8000)])
def test_all_hear_all_and_nothing_stays(num_ranks: int, size: int, meet: Meet) -> None:
    heartbeats = meet(num_ranks)
    kept = [set(each._known) for each in heartbeats]
    ranks = [HostGather(each, range(num_ranks), timeout_s=20) for each in heartbeats]
    for number in range(4):
        mine = [bytes([number, rank]) * size for rank in range(num_ranks)]
        said = together([partial(each.gather, own) for each, own in zip(ranks, mine, strict=True)])
        assert said == [mine] * num_ranks
    for each, before in zip(heartbeats, kept, strict=True):
        assert not [kind for kind in each._known.keys() - before if kind.startswith("said")]


def test_two_of_a_group_talk_beside_it(meet: Meet) -> None:
    ranks = [HostGather(each, range(3), timeout_s=20) for each in meet(3)]
    pair = [partial(ranks[1].gather, b"b", (1, 2)), partial(ranks[2].gather, b"c", (1, 2))]
    assert together(pair) == [[b"b", b"c"]] * 2
    assert together([partial(each.gather, b"x") for each in ranks]) == [[b"x"] * 3] * 3


def test_ranks_that_agree_go_on(meet: Meet) -> None:
    ranks = channels(meet(3))
    assert in_threads(ranks, lambda rank: rank.prepare("all_reduce")(torch.ones(4)).tolist()) == [[1.0] * 4] * 3


def test_ranks_that_disagree_say_so(meet: Meet) -> None:
    ranks = channels(meet(2))
    said = in_threads(ranks, lambda rank: rank.prepare("all_reduce")(torch.ones(4 + rank.rank)))
    assert [type(each) for each in said] == [RankMismatch] * 2, said


def test_counts_that_disagree_are_named(meet: Meet) -> None:
    ranks = channels(meet(2))
    said = in_threads(ranks, lambda rank: rank.prepare("all_to_all")(torch.ones(3, 1), [1, 2], [1, 1 + rank.rank]))
    assert [type(each) for each in said] == [RankMismatch] * 2, said


def test_send_and_receive_compare_between_two(meet: Meet) -> None:
    """Nothing of the third is needed."""

    def run(rank: GroupChannel) -> object:
        if rank.rank == 0:
            return rank.prepare("send", to=1)(torch.ones(4))
        return rank.prepare("receive", from_=0)((5,), torch.float32)

    said = in_threads(channels(meet(3))[:2], run)
    assert [type(each) for each in said] == [RankMismatch] * 2, said


@pytest.mark.parametrize("waits", [0, 1])
def test_a_rank_that_lives_and_does_not_come_is_named_within_the_timeout(waits: int, meet: Meet) -> None:
    """From then on groups are aborted, not destroyed: that would wait for it."""
    rank = channels(meet(2), timeout_s=1.5)[waits]
    assert not rank._state.verdict.is_known
    with pytest.raises(RankLost, match=f"rank {1 - waits} did not answer within 1.5 s; its process is alive"):
        rank.prepare("all_reduce")(torch.ones(4))
    assert rank._state.verdict.is_known


@pytest.mark.parametrize("waits", [0, 1])
def test_a_rank_that_fails_is_named_at_once(waits: int, meet: Meet) -> None:
    heartbeats = meet(2)
    threading.Timer(0.2, lambda: heartbeats[1 - waits].tell("failed", "ValueError: its own")).start()
    start = time.monotonic()
    with pytest.raises(RankLost, match=f"rank {1 - waits} failed: ValueError: its own"):
        channels(heartbeats)[waits].prepare("all_reduce")(torch.ones(4))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("waits", [0, 1])
def test_a_rank_that_left_is_not_waited_for(waits: int, meet: Meet) -> None:
    heartbeats = meet(2)
    heartbeats[1 - waits].close()
    start = time.monotonic()
    with pytest.raises(RankLost, match="left" if waits == 0 else "lost|left"):
        channels(heartbeats)[waits].prepare("all_reduce")(torch.ones(4))
    assert time.monotonic() - start < 10


def test_the_last_word_of_a_rank_that_left_is_heard(meet: Meet) -> None:
    heartbeats = meet(2)
    ranks = [HostGather(each, range(2), timeout_s=20) for each in heartbeats]

    def first() -> list[bytes]:
        said = ranks[0].gather(b"a")
        heartbeats[0].close()
        return said

    assert together([first, partial(ranks[1].gather, b"b")]) == [[b"a", b"b"]] * 2
