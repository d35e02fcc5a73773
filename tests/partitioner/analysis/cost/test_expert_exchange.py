"""What it costs to bring tokens of ranks' own to experts, and which way is taken."""

from __future__ import annotations

import pytest

from partitioner.analysis.cost.expert_exchange import OwnTokens, destinations


def layer(ranks: int, num_experts: int, hidden: int, *, own: int | None = None) -> OwnTokens:
    return OwnTokens(ranks, own or ranks, num_experts, 8, 2 * hidden)


def test_destinations_of_a_token() -> None:
    assert destinations(2, 4, 1) == pytest.approx(0.5)
    assert destinations(4, 8, 2) == pytest.approx(3 * (1 - (6 * 5) / (8 * 7)))
    assert destinations(8, 8, 8) == 7


def test_gather_on_few_ranks_and_exchange_where_rows_dominate() -> None:
    for experts, hidden in ((128, 2048), (256, 7168)):
        chosen = {ranks: layer(ranks, experts, hidden).cheapest() for ranks in (2, 4, 16, 32, 256)}
        assert chosen == {2: "gather", 4: "gather", 16: "exchange", 32: "exchange", 256: "exchange"}
    # at eight ranks the width of a row decides
    assert layer(8, 128, 2048).cheapest() == "gather"
    assert layer(8, 256, 7168).cheapest() == "exchange"


def test_ranks_of_tp_share_out_what_they_send() -> None:
    assert layer(256, 256, 7168, own=32).exchange_s() < layer(256, 256, 7168).exchange_s() / 3
    assert layer(4, 128, 2048, own=2).gather_s() < layer(4, 128, 2048).gather_s()
