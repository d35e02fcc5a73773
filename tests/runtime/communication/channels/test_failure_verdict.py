"""What a failed collective means, from what is known of the other ranks: no process is started here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from partitioner.errors import RankLost, RankMismatch
from partitioner.sharding.mesh import Mesh
from runtime.communication.failure_verdict import FailureVerdict
from runtime.processes.place import Place

TIMED_OUT, CLOSED = RuntimeError("timed out waiting 8000ms"), RuntimeError("Connection closed by peer")


@dataclass
class Known:
    """In place of a heartbeat."""

    rank: int
    silent: dict[int, float] = field(default_factory=dict)
    told: dict[str, dict[int, str]] = field(default_factory=dict)
    num_ranks: int = 4
    is_cut_off: bool = False

    def __post_init__(self) -> None:
        self.names = Place(Mesh.of(pp=2, tp=2), self.rank, 1, 2).names
        self.said: list[str] = []

    def known(self, kind: str) -> dict[int, str]:
        return self.told.get(kind, {})

    def lost(self) -> dict[int, str]:
        return self.told.get("lost", {})

    def silent_s(self, rank: int) -> float:
        return self.silent.get(rank, 0.0)

    def tell(self, kind: str, text: str) -> None:
        self.said.append(kind)


def concluded(known: Known, group: tuple[int, ...], error: RuntimeError, timeout_s: float = 8.0) -> Any:
    verdict = FailureVerdict(known, known.rank, timeout_s=timeout_s)  # type: ignore[arg-type]
    found = verdict.conclude(f"rank {known.rank}: a node", group, error)
    assert known.said == ["waiting", "verdict"]
    return found


@pytest.mark.parametrize("error", [TIMED_OUT, CLOSED])
def test_a_silent_rank_is_named_however_the_connection_ended(error: RuntimeError) -> None:
    found = concluded(Known(0, silent={2: 9.0, 3: 9.0}), (0, 2), error)
    assert isinstance(found, RankLost)
    assert str(found).startswith("rank 2 of replica 1 (stage 1) did not answer within 8 s; no sign of life comes from")


def test_a_connection_that_a_living_rank_broke_is_not_called_silence() -> None:
    found = str(concluded(Known(0), (0, 2), CLOSED))
    assert found.startswith("rank 2 of replica 1 (stage 1) did not say why a connection broke, and still runs")
    slow = str(concluded(Known(0), (0, 2), TIMED_OUT))
    assert "rank 2 of replica 1 (stage 1) did not answer within 8 s; its process is alive" in slow


@pytest.mark.parametrize("error", [TIMED_OUT, CLOSED])
def test_who_cannot_hear_rank_0_knows_nothing_of_the_others(error: RuntimeError) -> None:
    """Its neighbour on the same host may have left, or wait as well: that would come through rank 0."""
    found = str(concluded(Known(3, silent={0: 9.0, 2: 1.5}), (2, 3), error))
    assert found.startswith("rank 0 of replica 1 (stage 0) did not answer within 8 s; no sign of life comes from")


def test_a_rank_0_that_is_late_by_a_beat_or_two_is_not_blamed() -> None:
    found = str(concluded(Known(3, silent={0: 1.5}), (2, 3), CLOSED))
    assert found.startswith("rank 2 of replica 1 (stage 1) did not say why")


def test_who_waits_at_the_same_call_is_not_blamed() -> None:
    """Ranks came at different times, so that some have not given up yet."""
    at = {2: "rank 2: a node", 3: "rank 3: the node before"}
    found = str(concluded(Known(0, told={"at": at}), (0, 2, 3), TIMED_OUT))
    assert found.startswith("rank 3 of replica 1 (stage 1) did not answer within 8 s; its process is alive")
    assert "last checked there: rank 3: the node before" in found
    unknown = str(concluded(Known(0, told={"at": {2: "rank 2: a node"}}), (0, 2), TIMED_OUT))
    assert unknown.startswith("rank 2 of replica 1 (stage 1) did not answer")


def test_what_is_known_comes_before_silence() -> None:
    gone = Known(3, silent={0: 9.0}, told={"lost": {1: "lost: its process ended"}})
    assert str(concluded(gone, (2, 3), CLOSED)).startswith("rank 1 of replica 1 (stage 0) lost: its process ended")
    waits = Known(0, told={"waiting": {2: "rank 2: another node"}})
    assert isinstance(concluded(waits, (0, 2), TIMED_OUT), RankMismatch)
