"""Schedules of stages, played through: those that are used run without buffers, those that would need them are told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from partitioner.compile.emit import Emitter
from partitioner.errors import RankMismatch
from partitioner.proof.meetings import Event, events_of
from partitioner.proof.schedules import boundaries_of, play_schedule
from partitioner.sharding.mesh import Mesh
from runtime.ops.communicating import Meeting
from runtime.pipeline.schedule import Action, Receive, Run, Send, bubble, chain, naive_ring, pieces_of, relay, ring
from tests.support.partitioned import compiled


def boundaries(count: int) -> tuple[tuple[Event, ...], ...]:
    values = ("hidden", "residual")
    return tuple(
        tuple(Event(name, Meeting("send", ("pp",), ("batch", 8), torch.float32, peer=k + 1)) for name in values)
        for k in range(count - 1)
    )


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_chains_and_rings_need_no_buffers(stages: int, pieces: int) -> None:
    play_schedule(chain(stages, pieces), boundaries(stages))
    play_schedule(chain(stages, pieces, early=False), boundaries(stages))
    for groups in (stages, stages + 1, 2 * stages):
        play_schedule(ring(stages, groups, pieces * stages), boundaries(stages))
        play_schedule(relay(stages, groups, pieces * stages), boundaries(stages))
        shared = relay(stages, groups, pieces * stages, shares_head=True)
        play_schedule(shared, [*boundaries(stages), boundaries(stages)[0]])


def test_a_long_schedule_looks_its_ranks_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, group = [0], Mesh.group

    def counted(mesh: Mesh, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        asked[0] += 1
        return group(mesh, axes, rank)

    monkeypatch.setattr(Mesh, "group", counted)
    play_schedule(chain(6, 13), boundaries(6))
    # each stage's neighbours, not each piece
    assert asked[0] == 10


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_ring_that_suggests_itself_waits_for_ever(stages: int) -> None:
    with pytest.raises(RankMismatch, match=r"wait for each other|disagree"):
        play_schedule(naive_ring(stages, stages, 3), boundaries(stages))


def test_mistakes_in_a_schedule_are_told() -> None:
    good = chain(2, 4)
    swapped = list(good[0])
    first, second = (i for i, action in enumerate(swapped) if action in (Send(1), Send(2)))
    swapped[first], swapped[second] = swapped[second], swapped[first]
    with pytest.raises(RankMismatch, match="disagree"):
        play_schedule((tuple(swapped), good[1]), boundaries(2))
    dropped = tuple(action for action in good[1] if action != Receive(2))
    with pytest.raises(RankMismatch):
        play_schedule((good[0], dropped), boundaries(2))
    with pytest.raises(RankMismatch, match="nothing more to do"):
        play_schedule((chain(2, 5)[0], good[1]), boundaries(2))


def test_mistakes_in_a_relay_are_told() -> None:
    good = relay(3, 3, 7)
    play_schedule(good, boundaries(3))
    # every stage hands on before it takes in what comes next: all wait to send
    hasty = tuple(
        tuple(sorted(timeline, key=lambda action: (_turn(timeline, action), isinstance(action, Receive))))
        for timeline in good[1:]
    )
    with pytest.raises(RankMismatch):
        play_schedule((good[0], *hasty), boundaries(3))
    # a stage that goes on when the others have heard that all have ended
    with pytest.raises(RankMismatch):
        play_schedule((good[0], relay(3, 3, 8)[1], good[2]), boundaries(3))
    # tokens that nobody takes
    with pytest.raises(RankMismatch):
        play_schedule((good[0][:-1], *good[1:]), boundaries(3))


def _turn(timeline: Sequence[Action], action: Action) -> int:
    """How many turns a stage has run when it comes to an action."""
    return sum(isinstance(each, Run) for each in timeline[: timeline.index(action) + 1])


def test_the_graphs_of_all_ranks_within_their_schedule() -> None:
    parts = compiled("llama", 2, pp=2)
    emitter = Emitter(parts.program)
    ranks = [emitter.rank(at) for at in parts.mesh]
    events = {rank.rank: events_of(rank.graph) for rank in ranks}
    assert all(events.values())
    cuts = boundaries_of(parts.program)
    play_schedule(chain(2, 3), cuts, mesh=parts.mesh, events=events)
    play_schedule(ring(2, 2, 5), cuts, mesh=parts.mesh, events=events)
    # one rank of a stage leaves out a sum that the other waits for
    events[3] = events[3][1:]
    with pytest.raises(RankMismatch):
        play_schedule(chain(2, 3), cuts, mesh=parts.mesh, events=events)


def test_idle_time_of_a_chain() -> None:
    assert bubble(2, 1) == 0.5
    assert bubble(4, 8) == pytest.approx(3 / 11)
    assert [piece.stop - piece.start for piece in pieces_of(5, 1)] == [1] * 5
    assert sum(piece.stop - piece.start for piece in pieces_of(33, 2)) == 33
    assert len(pieces_of(33, 2)) == 16
