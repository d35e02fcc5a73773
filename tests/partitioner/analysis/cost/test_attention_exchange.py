"""Which way keys reach queries is priced by what has been measured, for all layers together."""

from __future__ import annotations

import dataclasses

import pytest

from partitioner.analysis.cost.attention_exchange import Exchanged, cheapest

LLAMA = Exchanged(32, 8, 128, 128)


def test_two_gpus_of_one_host_exchange_heads() -> None:
    """As measured: 0.72 to 0.97 of ideal, against 0.46 to 0.61 by a ring."""
    how, why = cheapest([LLAMA] * 32, 2)
    assert how == "ulysses"
    assert "ms to exchange heads (ulysses) or" in why
    ideal = LLAMA.attention_s(2)
    assert 0.72 < ideal / (ideal + LLAMA.ulysses_s(2)) < 0.97
    assert 0.46 < ideal / (ideal + LLAMA.ring_s(2)) < 0.61


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_prices_are_of_all_layers(ranks: int) -> None:
    few = Exchanged(ranks, 1, 128, 128)
    assert few.ulysses_s(ranks) > 0
    assert cheapest([LLAMA, few], ranks)[0] == ("ulysses" if LLAMA.heads >= ranks else "ring")
    how, why = cheapest([LLAMA, Exchanged(ranks - 1, 1, 128, 128)], ranks)
    assert how == "ring"
    assert f"{ranks - 1} heads on a rank, fewer than {ranks}" in why


def test_scores_of_all_tokens_are_not_written_out() -> None:
    how, why = cheapest([LLAMA, dataclasses.replace(LLAMA, has_kernel=False)], 2)
    assert how == "ring"
    assert "a window, chunk, soft cap or sinks" in why


def test_a_ring_whose_kernel_is_as_fast_would_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: it is the measured share that decides, where keys and values are few of the numbers."""
    monkeypatch.setattr("partitioner.analysis.cost.attention_exchange.OF_A_BLOCK", 1.0)
    assert cheapest([Exchanged(32, 1, 128, 128)], 2)[0] == "ring"
