"""Which way keys reach queries is priced by what has been measured, for all layers together."""

from __future__ import annotations

import dataclasses

import pytest

from partitioner.analysis.cost import attention_exchange
from partitioner.analysis.cost.attention_exchange import Exchanged, cheapest

LLAMA = Exchanged(32, 8, 128, 128)


def test_two_gpus_of_one_host_are_a_ring() -> None:
    """As measured at 16k tokens a rank: 0.78 ms to exchange heads, and a ring 0.97 of ideal or more."""
    how, why = cheapest([LLAMA] * 32, 2)
    assert how == "ring"
    assert "ms to exchange heads (ulysses) or" in why
    assert LLAMA.ulysses_s(2) == pytest.approx(0.78e-3, rel=0.1)
    ideal = LLAMA.attention_s(2)
    assert 0.97 < ideal / (ideal + LLAMA.ring_s(2)) < 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_prices_are_of_all_layers(ranks: int) -> None:
    few = Exchanged(ranks, 1, 128, 128)
    assert few.ulysses_s(ranks) > 0
    how, why = cheapest([LLAMA, Exchanged(ranks - 1, 1, 128, 128)], ranks)
    assert how == "ring"
    assert f"{ranks - 1} heads on a rank, fewer than {ranks}" in why


def test_scores_of_all_tokens_are_not_written_out() -> None:
    how, why = cheapest([LLAMA, dataclasses.replace(LLAMA, has_kernel=False)], 2)
    assert how == "ring"
    assert "a window, chunk, soft cap or sinks" in why


def test_a_ring_whose_messages_nothing_hides_would_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: it is the measured link that decides, where keys and values are as many as queries."""
    monkeypatch.setattr(attention_exchange, "PERMUTE_BYTES_PER_S", 2e10)
    assert cheapest([Exchanged(32, 32, 128, 128)], 2)[0] == "ulysses"
