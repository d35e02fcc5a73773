"""Experts dealt out by how many tokens chose them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partitioner.errors import PlanError
from partitioner.program.balance import balance, imbalance


def zipf(num_experts: int, seed: int, *, tokens: int = 200_000, skew: float = 1.0) -> list[float]:
    """How often each expert is drawn; which ones are hot is part of the skew, not of the draw."""
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(0))
    weights = (1.0 / torch.arange(1, num_experts + 1, dtype=torch.float64) ** skew)[order]
    drawn = torch.multinomial(weights, tokens, replacement=True, generator=torch.Generator().manual_seed(seed))
    return torch.bincount(drawn, minlength=num_experts).tolist()


def test_zipf_skew_is_evened_out_with_32_copies_of_256_experts() -> None:
    counts, second = zipf(256, seed=1), zipf(256, seed=2)
    runs = tuple(tuple(range(rank * 8, rank * 8 + 8)) for rank in range(32))
    owners = balance(counts, 32, extra=32)
    assert imbalance(counts, runs) > 2
    assert imbalance(counts, balance(counts, 32)) > 2  # the control: without copies the hottest expert is too much
    assert imbalance(counts, owners) <= 1.10
    assert imbalance(second, owners) <= 1.20
    assert {len(mine) for mine in owners} == {9}


@pytest.mark.parametrize(("num_experts", "ranks"), [(7, 2), (60, 8)])
def test_numbers_that_do_not_divide(num_experts: int, ranks: int) -> None:
    owners = balance([1.0] * num_experts, ranks)
    sizes = [len(mine) for mine in owners]
    assert sum(sizes) == num_experts
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=24), st.integers(1, 8), st.integers(0, 30))
def test_every_expert_has_an_owner(counts: list[int], ranks: int, extra: int) -> None:
    extra = min(extra, len(counts) * (ranks - 1))
    owners = balance(counts, ranks, extra)
    assert len(owners) == ranks
    assert sum(map(len, owners)) == len(counts) + extra
    assert {expert for mine in owners for expert in mine} == set(range(len(counts)))
    assert all(list(mine) == sorted(set(mine)) for mine in owners)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PlanError, match="room for 4 copies"):
        balance([1, 2], 3, extra=5)
    for counts, ranks, extra in (([], 2, 0), ([1.0, -1.0], 2, 0), ([1.0], 0, 0), ([1.0], 2, -1)):
        with pytest.raises(PlanError, match="balance takes counts"):
            balance(counts, ranks, extra)
