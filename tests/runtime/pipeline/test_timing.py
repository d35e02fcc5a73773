"""The computed timeline of a schedule: its bubble is the formula's where stages are equal, and no less where not."""

from __future__ import annotations

import pytest

from partitioner.errors import InputError
from runtime.pipeline.schedule import Receive, Run, Send, bubble, chain, chunk_ends, ring
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


@pytest.mark.parametrize(("tokens", "least", "longest"), [(1, 8, 512), (63, 8, 512), (700, 8, 512), (5000, 4, 512)])
@pytest.mark.parametrize("pairs_per_token", [0, 100, 100_000])
def test_chunks_of_a_prompt_take_equally_long(tokens: int, least: int, longest: int, pairs_per_token: int) -> None:
    ends = chunk_ends(tokens, least=least, longest=longest, pairs_per_token=pairs_per_token)
    starts = [0, *ends[:-1]]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    assert ends[-1] == tokens
    assert min(sizes) > 0
    assert max(sizes) <= longest
    assert len(ends) >= min(least, tokens // 64)
    if tokens >= 700 and pairs_per_token:
        costs = [n + n * (start + n / 2) / pairs_per_token for start, n in zip(starts, sizes, strict=True)]
        assert max(costs) < 1.1 * min(costs)
        assert sizes[0] >= sizes[-1]


@pytest.mark.parametrize(("tokens", "least"), [(65536, 16), (65536, 8), (40001, 16), (20000, 4)])
def test_long_chunks_are_powers_of_two(tokens: int, least: int) -> None:
    """So that other prompts are cut at the same places; no chunk costs more than an equal part."""
    pairs_per_token = 25_000
    ends = chunk_ends(tokens, least=least, longest=16384, pairs_per_token=pairs_per_token)
    starts = [0, *ends[:-1]]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    assert ends[-1] == tokens
    assert sizes == sorted(sizes, reverse=True)
    assert all(size & (size - 1) == 0 and start % size == 0 for start, size in zip(starts, sizes[:-1], strict=False))
    costs = [n + n * (start + n / 2) / pairs_per_token for start, n in zip(starts, sizes, strict=True)]
    whole = tokens + tokens**2 / 2 / pairs_per_token
    assert max(costs) <= whole / least
    assert len(ends) <= 3 * least
    stop = time_of(chain(2, len(ends)), [costs, costs]).stop
    assert stop < whole * (1 + 1 / least)
