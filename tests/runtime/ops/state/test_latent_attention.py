"""Attention over a narrow value that is cached: absorbed and expanded are the attention that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner.analysis.rules import RULES
from partitioner.errors import InputError
from partitioner.proof.try_rule import check_rule
from runtime.ops.attention import attention
from runtime.ops.state import latent_attention as module
from runtime.ops.state.latent_attention import absorbs, attend, latent_attention

HEADS, KEY, CARRIED, LATENT, VALUE, CACHED = 3, 4, 2, 5, 6, 9


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def operands(queries: int, batch: int = 2, carried: int = CARRIED) -> tuple[Any, ...]:
    return (
        drawn(batch, HEADS, queries, KEY), drawn(batch, HEADS, queries, carried) if carried else None,
        drawn(batch, CACHED, LATENT + carried), drawn(HEADS, KEY, LATENT), drawn(HEADS, VALUE, LATENT, seed=1),
    )  # fmt: skip


def expected(given: tuple[Any, ...], mask: Tensor | None, sinks: Tensor | None, **options: Any) -> Tensor:
    q, carried_q, rows, key_weight, value_weight = given
    latent, carried = rows[..., :LATENT], rows[..., LATENT:]
    keys = torch.einsum("btr,hpr->bhtp", latent, key_weight)
    if carried_q is not None:
        keys = torch.cat([keys, carried[:, None].expand(-1, HEADS, -1, -1)], -1)
        q = torch.cat([q, carried_q], -1)
    return attention(q, keys, torch.einsum("btr,hvr->bhtv", latent, value_weight), mask, sinks, **options)


@pytest.mark.parametrize("way", ["absorbed", "expanded", "expanded by head"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("carried", [CARRIED, 0])
def test_both_ways_are_that_attention(way: str, queries: int, carried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "absorbs", lambda *sizes, **more: way == "absorbed")
    if way == "expanded by head":
        monkeypatch.setattr(module, "EXPANDED_BYTES", 1)
    hidden = torch.zeros(2, 1, queries, CACHED, dtype=torch.float64)
    hidden[0, :, :, 5:] = -torch.inf
    of_heads = drawn(1, HEADS, queries, CACHED)
    sinks = drawn(HEADS)
    given = operands(queries, carried=carried)
    for mask, extra, softcap in (
        (None, None, None),
        (hidden, None, None),
        (hidden + of_heads, sinks, None),
        (hidden, sinks.view(1, HEADS, 1, 1), 2.0),
    ):
        options = {"scale": 0.3, "softcap": softcap}
        found = attend(*given, mask, extra, **options)
        wanted = expected(given, mask, extra, **options)
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() < 1e-12


def test_a_rank_without_heads_has_nothing_to_say() -> None:
    q, carried_q, rows, key_weight, value_weight = operands(3)
    found = attend(
        q[:, :0], carried_q[:, :0], rows, key_weight[:0], value_weight[:0], None, None, scale=1, softcap=None
    )
    assert found.shape == (2, 0, 3, VALUE)


def test_single_tokens_are_absorbed_and_prompts_are_not() -> None:
    sizes = {"key": 128, "value": 128, "latent": 512, "carried": 64}
    assert absorbs(1, 1000, **sizes)
    assert not absorbs(512, 1000, **sizes)
    assert not absorbs(1, 1, **sizes)


def test_the_rule_says_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_itself(
        q: Tensor, carried_q: Tensor, latent: Tensor, carried: Tensor, key_weight: Tensor, value_weight: Tensor
    ) -> Tensor:
        rows = torch.cat([latent, carried], -1)
        return attend(q, carried_q, rows, key_weight, value_weight, None, None, scale=0.3, softcap=None)

    monkeypatch.setitem(RULES, of_itself, lambda node, a: RULES[latent_attention](node, {**a, "positions": None}))
    q, carried_q, rows, key_weight, value_weight = operands(7)
    given = (q, carried_q, rows[..., :LATENT], rows[..., LATENT:], key_weight, value_weight)
    assert check_rule(of_itself, *given).whole == frozenset("stperv")


def test_it_runs_over_a_cache_only() -> None:
    with pytest.raises(InputError, match="latent_attention of 'a' is not bound to a cache"):
        latent_attention(*[torch.zeros(1)] * 7, state="a", scale=1.0)
