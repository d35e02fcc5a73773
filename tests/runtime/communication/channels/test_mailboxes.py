"""Messages through shared memory: every primitive, any order, what is told of those that do not fit, and the memory."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partitioner.errors import CommunicationError, RankLost, RankMismatch
from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import Channel, Handle
from runtime.communication.group_channel import GroupChannel
from runtime.communication.shared_memory import shared_memory
from runtime.communication.shared_memory.mailboxes import MOST_AWAITED
from runtime.communication.shared_memory.segment import Segment
from runtime.communication.thread_communicator import ThreadGroup
from tests.runtime.communication.channels.channel_cases import every_primitive, piece
from tests.runtime.communication.channels.ends import channels, in_threads
from tests.runtime.communication.channels.threads import run

RANKS = 3


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_primitive(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = channels(num_ranks, monkeypatch)
    for checking in (False, True):
        for channel in ranks:
            channel._state.checking = checking
        assert in_threads(ranks, every_primitive) == [None] * num_ranks


# -- random programs ---------------------------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(0, 9), st.integers(0, 5000), st.just(700_000))
"""Of float32 and int16: up to some MB."""
SHIFTS = st.integers(-RANKS, RANKS)
PEERS = st.permutations(range(RANKS)).map(lambda order: tuple(order[:2]))
TABLES = st.lists(st.lists(st.integers(0, 300), min_size=RANKS, max_size=RANKS), min_size=RANKS, max_size=RANKS)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), PEERS, SIZES),
        st.tuples(st.just("permute"), SHIFTS, SIZES),
        st.tuples(st.just("again"), SHIFTS, SIZES),
        st.tuples(st.just("exchange"), TABLES),
        st.tuples(st.just("scatter"), st.integers(0, 40)),
        st.tuples(st.just("sum"), st.integers(1, 40)),
    ),
    max_size=30,
)  # fmt: skip


def program(channel: Channel, steps: list[tuple[Any, ...]], seed: int) -> list[Tensor]:
    """What a rank gets in each step; it finishes what it has begun late, in any order."""
    own, late = channel.coordinate, random.Random(seed + channel.coordinate)
    begun: dict[int, Handle] = {}
    found: dict[int, Tensor] = {}
    for number, (kind, *of_step) in enumerate(steps):
        dtype = (torch.float32, torch.int16)[number % 2]
        if kind == "send":
            (sender, receiver), size = of_step
            if own == sender:
                channel.send_begin(piece(number, size, dtype=dtype), receiver).finish().zero_()
            elif own == receiver:
                begun[number] = channel.receive_begin((size,), dtype, sender)
        elif kind == "permute":
            shift, size = of_step
            begun[number] = channel.permute_begin(piece(10 * number + own, size, dtype=dtype), shift)
        elif kind == "again":
            shift, size = of_step
            memory = piece(10 * number + own, size, dtype=dtype)
            again = channel.persistent_permute(memory, shift)
            again.begin()
            first = again.finish().clone()
            memory.copy_(piece(10 * number + own + 3, size, dtype=dtype) + first)
            again.begin()
            begun[number] = Handle(again.finish)
        elif kind == "exchange":
            (counts,) = of_step
            rows = piece(10 * number + own, sum(counts[own]), 3, dtype=dtype)
            received = [counts[other][own] for other in range(RANKS)]
            begun[number] = channel.all_to_all_begin(rows, counts[own], received)
        elif kind == "scatter":
            sizes = [of_step[0], 0, 3]
            x = piece(10 * number + own, sum(sizes), 4, dtype=dtype)
            found[number] = channel.reduce_scatter(x, 0, sizes)
        else:
            found[number] = channel.all_reduce(piece(10 * number + own, of_step[0], dtype=dtype))
        for ready in late.sample(sorted(begun), late.randrange(len(begun) + 1)):
            found[ready] = begun.pop(ready).finish()
    for ready in sorted(begun, reverse=True):
        found[ready] = begun.pop(ready).finish()
    return [found[number] for number in sorted(found)]


@given(steps=STEPS, seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_any_program_yields_what_the_simulator_says(steps: list[tuple[Any, ...]], seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        _same_as_the_simulator(steps, seed, monkeypatch)


@pytest.mark.slow
@given(steps=STEPS, seed=st.integers(0, 1000))
@settings(max_examples=400, deadline=None)
def test_many_programs_yield_what_the_simulator_says(steps: list[tuple[Any, ...]], seed: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        _same_as_the_simulator(steps, seed, monkeypatch)


def _same_as_the_simulator(steps: list[tuple[Any, ...]], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = run(
        ThreadGroup(Mesh.of(tp=RANKS)), *[lambda comm: program(comm.channel("tp", node="n"), steps, seed)] * RANKS
    )
    ranks = channels(RANKS, monkeypatch)
    for expected, found in zip(simulated, in_threads(ranks, lambda c: program(c, steps, seed)), strict=True):
        assert isinstance(expected, list), expected
        assert isinstance(found, list), found
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
    for channel in ranks:
        assert channel._shared is not None
        channel._shared.close()


def test_two_groups_of_the_same_ranks_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = channels(2, monkeypatch), channels(2, monkeypatch)

    def body(channel: GroupChannel) -> float:
        other = second[channel.coordinate]
        begun = [
            each.permute_begin(torch.tensor([10.0 * i + channel.coordinate]), 1)
            for i, each in enumerate((channel, other))
        ]
        return 1000 * begun[1].finish().item() + begun[0].finish().item()

    assert in_threads(first, body) == [11_001.0, 10_000.0]


# -- what does not fit -------------------------------------------------------------------------------------------------

NONE = torch.ones(0)
WRONG: dict[str, tuple[Callable[[Channel], Handle], str]] = {
    "size": (lambda c: c.receive_begin((3,), torch.float32, 0), "a send of torch.float32, bytes: 12"),
    "dtype": (lambda c: c.receive_begin((2,), torch.int32, 0), "a send of torch.int32, bytes: 8"),
    "kind": (lambda c: c.permute_begin(torch.ones(2), 1), "a permute of torch.float32, bytes: 8"),
    "exchange": (lambda c: c.all_to_all_begin(NONE, [0, 0], [0, 0]), "an all_to_all of torch.float32, bytes: 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_message_that_is_another_is_told_and_dropped(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = channels(2, monkeypatch)
    sender.send_begin(torch.ones(2), 1)
    sender.send_begin(torch.full((2,), 5.0), 1)
    begin, said = WRONG[case]
    handle = begin(receiver)
    for _ in range(2):
        with pytest.raises(RankMismatch) as caught:
            handle.finish()
        assert "  rank 0: a send of torch.float32, bytes: 8\n" in str(caught.value)
        assert f"  rank 1: {said}\n" in str(caught.value)
        assert "this one is rank 1: node 'n'" in str(caught.value)
    assert receiver.receive_begin((2,), torch.float32, 0).finish().tolist() == [5, 5]


def test_of_the_same_size_and_dtype_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = channels(2, monkeypatch)
    sender.send_begin(torch.ones(2, 2).t(), 1)
    assert receiver.receive_begin((4,), torch.float32, 0).finish().tolist() == [1] * 4


# -- memory, and how much is under way ---------------------------------------------------------------------------------


def test_as_many_as_one_likes_may_be_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither side ever needs the other to finish; and what is under way stays bounded."""
    ranks = channels(2, monkeypatch)
    many, size = 10 * MOST_AWAITED, 1000

    def body(channel: GroupChannel) -> list[float]:
        if channel.coordinate == 0:
            handles = [channel.send_begin(torch.full((size,), float(i)), 1) for i in range(many)]
            channel.all_reduce(torch.ones(1))
            return [handle.finish()[0].item() for handle in handles]
        coming = [channel.receive_begin((size,), torch.float32, 0) for _ in range(many)]
        channel.all_reduce(torch.ones(1))
        return [handle.finish()[0].item() for handle in reversed(coming)][::-1]

    assert in_threads(ranks, body) == [[float(i) for i in range(many)]] * 2
    assert _backed(ranks[0]) <= 1 << 20


def test_slots_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = channels(2, monkeypatch)
    backed = []
    for step in range(60):
        handles = [channel.permute_begin(torch.ones(100_000 + step), 1) for channel in ranks]
        assert [handle.finish().sum().item() for handle in handles] == [100_000 + step] * 2
        backed.append(_backed(ranks[0]))
    assert backed[-1] == backed[1], "sizes that are alike share slots"


def test_a_rank_that_takes_nothing_is_named_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, _ = channels(2, monkeypatch, timeout_s=0.2)
    for _ in range(2 * MOST_AWAITED):
        sender.send_begin(torch.ones(1), 1)
    with pytest.raises(RankLost, match=r"timed out after 0.2 s, rank 1 late"):
        sender.send_begin(torch.ones(1), 1)
    with pytest.raises(RankLost, match="broken before this operation"):
        sender.send_begin(torch.ones(1), 1)


def test_what_was_sent_before_a_rank_left_still_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = channels(2, monkeypatch)
    sender.send_begin(torch.ones(3), 1)
    assert sender._shared is not None
    sender._shared.close()
    first, second = (receiver.receive_begin((3,), torch.float32, 0) for _ in range(2))
    assert first.finish().tolist() == [1, 1, 1]
    with pytest.raises(RankLost, match="closed by a rank that left"):
        second.finish()


def test_to_a_rank_that_left_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = channels(2, monkeypatch)
    assert receiver._shared is not None
    receiver._shared.close()
    with pytest.raises(RankLost, match="closed by a rank that left"):
        sender.send_begin(torch.ones(1), 1)


def test_behind_an_interrupt_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the message was taken is not known then."""
    _, receiver = channels(2, monkeypatch)
    handle = receiver.receive_begin((1,), torch.float32, 0)

    def interrupted(self: Segment, index: int) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Segment, "is_held", interrupted)
    with pytest.raises(KeyboardInterrupt):
        handle.finish()
    for begin in (lambda: handle.finish(), lambda: receiver.send_begin(torch.ones(1), 0)):
        with pytest.raises(RankLost, match="broken before this operation"):
            begin()


def test_more_than_there_is_memory_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_ARENA_BYTES", 1 << 14)
    sender, receiver = channels(2, monkeypatch)
    with pytest.raises(CommunicationError, match=r"node 'n' sends 20000 bytes to rank 1, for which there is no memory"):
        sender.send_begin(torch.ones(5000), 1)
    sender.send_begin(torch.ones(1000), 1)
    assert receiver.receive_begin((1000,), torch.float32, 0).finish().sum() == 1000


def _backed(channel: GroupChannel) -> int:
    assert channel._shared is not None
    messages = channel._shared.messages
    backed: int = messages._library.post_backed(messages._post)
    return backed
