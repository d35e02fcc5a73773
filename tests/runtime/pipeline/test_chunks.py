"""Chunks of a prompt take equally long, and as many of them keep the stages busiest."""

from __future__ import annotations

import itertools
from itertools import pairwise

import pytest

from runtime.pipeline.chunks import chunk_ends
from runtime.pipeline.schedule import chain
from runtime.pipeline.timing import time_of

BESIDES, BESIDES_ON_CPU = 200, 20


def sizes_of(ends: list[int]) -> list[int]:
    return [end - start for start, end in pairwise([0, *ends])]


def costs_of(ends: list[int], pairs_per_token: int) -> list[float]:
    return [n + n * (end - n / 2) / pairs_per_token for n, end in zip(sizes_of(ends), ends, strict=True)]


def stop(costs: list[float], stages: int, besides: float = BESIDES) -> float:
    """When a chain of these is through, of whose stages each does an equal part."""
    return time_of(chain(stages, len(costs)), [[(cost + besides) / stages for cost in costs]] * stages).stop


@pytest.mark.parametrize(("tokens", "longest"), [(1, 512), (63, 512), (700, 512), (5000, 512)])
@pytest.mark.parametrize("pairs_per_token", [0, 100, 100_000])
@pytest.mark.parametrize("stages", [2, 4])
def test_chunks_of_a_prompt_take_equally_long(tokens: int, longest: int, pairs_per_token: int, stages: int) -> None:
    ends = chunk_ends(tokens, stages=stages, longest=longest, pairs_per_token=pairs_per_token)
    sizes = sizes_of(ends)
    assert ends[-1] == tokens
    assert min(sizes) > 0
    assert max(sizes) <= longest
    costs = costs_of(ends, pairs_per_token) if pairs_per_token else [float(size) for size in sizes]
    if tokens >= 700:
        found, many = stop(costs, stages, BESIDES_ON_CPU), range(1, tokens // 64 + 1)
        of_equal_ones = {count: stop([sum(costs) / count] * count, stages, BESIDES_ON_CPU) for count in many}
        assert found < 1.06 * min(of_equal_ones.values())
        assert of_equal_ones[1] > 1.3 * found  # in one piece
    if tokens >= 700 and pairs_per_token:
        assert max(costs) < 1.15 * min(costs)
        assert sizes[0] >= sizes[-1]


@pytest.mark.parametrize("tokens", [20_000, 40_001, 65_536, 131_072])
@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("pairs_per_token", [13_000, 27_000])
def test_chunks_of_a_gpu_are_powers_of_two_and_nearly_as_good_as_any(
    tokens: int, stages: int, pairs_per_token: int
) -> None:
    ends = chunk_ends(tokens, stages=stages, longest=16384, pairs_per_token=pairs_per_token, device="cuda")
    sizes = sizes_of(ends)
    assert ends[-1] == tokens
    assert all(size & (size - 1) == 0 and 512 <= size <= 16384 for size in sizes[:-1])
    assert all(start % size == 0 for start, size in zip([0, *ends], sizes[:-1], strict=False))
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    found = stop(costs_of(ends, pairs_per_token), stages)
    whole = tokens + tokens**2 / 2 / pairs_per_token
    of_equal_ones = {count: stop([whole / count] * count, stages) for count in {round(1.15**k) for k in range(37)}}
    # in such, part of a GPU would be idle
    assert found < 1.09 * min(of_equal_ones.values())
    # a few of them are worse than that
    assert of_equal_ones[3] > 1.05 * found


@pytest.mark.parametrize(("tokens", "most"), [(1000, 1), (1024, 1), (2000, 1), (4096, 2)])
def test_a_gpus_chunks_keep_its_host_no_longer_than_itself(tokens: int, most: int) -> None:
    given = {"stages": 2, "longest": 16384, "pairs_per_token": 26_624, "device": "cuda"}
    assert len(chunk_ends(tokens, **given)) <= most  # type: ignore[arg-type]
    # of several rows, it is all their tokens that keep it busy
    assert len(chunk_ends(tokens, rows=16, groups=2, **given)) > most  # type: ignore[arg-type]


def test_other_prompts_begin_with_the_same_chunks() -> None:
    """As far as kernels are prepared for the sizes of a chunk and of what is before it."""
    given = {"stages": 2, "longest": 16384, "pairs_per_token": 26_624, "device": "cuda"}
    pairs = set(pairwise([0, *chunk_ends(65_536, **given)]))  # type: ignore[arg-type]
    for tokens in (60_000, 63_999, 70_001):
        ends = chunk_ends(tokens, **given)  # type: ignore[arg-type]
        assert len(pairs & set(pairwise([0, *ends]))) > 0.75 * len(ends)


def test_rows_and_groups_need_fewer_chunks_each() -> None:
    def count(**given: int) -> int:
        return len(chunk_ends(30_000, stages=2, longest=16384, pairs_per_token=27_000, device="cuda", **given))

    assert count(rows=4, groups=4) < count()
    assert count() < count(rows=4)
    assert count(rows=2, groups=2) > 1


def test_no_chunk_is_longer_than_it_may_be() -> None:
    for longest in (1, 50, 100, 300, 1000):
        for tokens in (1, 63, 999, 2000):
            for device in ("cpu", "cuda"):
                ends = chunk_ends(tokens, stages=2, longest=longest, pairs_per_token=27_000, device=device)
                assert ends[-1] == tokens
                assert 0 < min(sizes_of(ends)) <= max(sizes_of(ends)) <= longest


def test_a_stage_alone_runs_what_it_may_at_a_time() -> None:
    assert chunk_ends(1000, stages=1, longest=400, pairs_per_token=0) == [333, 667, 1000]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("tokens", "longest", "pairs_per_token"),
    [(4000, 16, 272), (512, 1, 64), (32_768, 64, 4000), (1001, 7, 0), (600, 599, 30)],
)
def test_chunks_that_must_be_short_are_no_more_than_that_takes(
    tokens: int, longest: int, pairs_per_token: int, device: str
) -> None:
    ends = chunk_ends(tokens, stages=2, longest=longest, pairs_per_token=pairs_per_token, device=device)
    sizes = [end - start for start, end in itertools.pairwise([0, *ends])]
    assert ends[-1] == tokens
    assert all(0 < size <= longest for size in sizes)
    assert len(ends) <= max(-(-tokens // longest), 32)
