"""The computed timeline of a schedule: its bubble is the formula's where stages are equal, and no less where not."""

from __future__ import annotations

import pytest

from partitioner.errors import InputError
from runtime.pipeline.schedule import Receive, Run, Send, bubble, chain, ring
from runtime.pipeline.timing import one_at_a_time, time_of


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("pieces", [1, 4, 9])
def test_equal_stages_are_idle_as_the_formula_says(stages: int, pieces: int) -> None:
    timing = time_of(chain(stages, pieces), [[1.0]] * stages)
    assert timing.stop == pieces + stages - 1
    assert timing.bubble == pytest.approx(bubble(stages, pieces))
    assert one_at_a_time([[1.0]] * stages, pieces).bubble == pytest.approx(1 - 1 / stages)


def test_the_slowest_stage_and_transfers_cost() -> None:
    assert time_of(chain(2, 4), [[1.0], [2.0]]).stop == 1 + 4 * 2
    assert time_of(chain(2, 4), [[2.0], [1.0]]).stop == 4 * 2 + 1
    # one transfer shows, the others hide behind the pieces
    assert time_of(chain(2, 4), [[1.0], [1.0]], transfer=0.5).stop == 5.5
    assert time_of(ring(2, 2, 4), [[1.0], [1.0]], transfer=0.5).stop == 4 * 1.5


def test_pieces_of_different_sizes() -> None:
    assert time_of(chain(2, 3), [[1.0, 2.0, 3.0]] * 2).stop == 1 + 2 + 3 + 3


def test_a_schedule_that_waits_for_ever_is_told() -> None:
    with pytest.raises(InputError, match="waits for ever: stages \\[1\\]"):
        time_of(((Run(0),), (Receive(0), Run(0))), [[1.0], [1.0]])
    assert time_of(((Run(0), Send(0)), (Receive(0), Run(0))), [[1.0], [1.0]]).stop == 2
