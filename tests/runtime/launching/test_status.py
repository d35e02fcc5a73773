"""What a replica says of itself, and what has changed since."""

from __future__ import annotations

from runtime.launching.status import ReplicaStatus, ServingStatus


def test_rows_that_came_and_went_since_the_last_step() -> None:
    said = {"running": 3, "waiting": 1, "tokens_cached": 40, "tokens_that_fit": 64}
    assert ReplicaStatus.of(said, rows=6).waiting == 3
    gone = ReplicaStatus.of(said, rows=2)
    assert (gone.running, gone.waiting, gone.tokens_cached) == (2, 0, 40)
    assert (ReplicaStatus.of({}).running, ReplicaStatus.of({}, rows=2).waiting) == (0, 2)


def test_what_is_left_of_all() -> None:
    lost = ReplicaStatus.of({"running": 1, "tokens_cached": 5}, lost="rank 0 was ended by SIGKILL")
    assert (lost.running, lost.tokens_cached) == (0, 0)
    well = ReplicaStatus.of({"running": 1}, rows=3)
    both = ServingStatus((lost, well))
    assert (both.running, both.waiting, both.is_lost) == (1, 2, False)
    assert ServingStatus((lost,)).is_lost
