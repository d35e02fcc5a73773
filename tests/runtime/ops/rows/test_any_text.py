"""Whole texts of any length over any number of ranks: whatever travels, the same as on one rank."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.ops.attention import attention
from tests.runtime.ops.rows.sp_cases import drawn, over_ranks, tensors


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], int, dict[str, Any], dict[str, Any]]:
    batch, size, heads = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 6))
    kv = draw(st.integers(1, heads))
    uneven = heads % kv != 0 or draw(st.booleans())
    given = tensors(batch, size, heads=heads, kv=kv, width=draw(st.integers(1, 6)), value=draw(st.integers(1, 6)))
    limit = st.none() | st.integers(1, 12)
    options: dict[str, Any] = {
        "causal": draw(st.booleans()),
        "window": draw(limit),
        "chunk": draw(limit),
        "softcap": draw(st.sampled_from((None, 2.0))),
        "kv_map": draw(st.lists(st.integers(0, kv - 1), min_size=heads, max_size=heads)) if uneven else None,
        "sinks": drawn(heads, seed=7) if draw(st.booleans()) else None,
        "scale": 0.4,
    }
    over = {
        "how": draw(st.sampled_from(("ring", "gather", "ulysses"))),
        "order": draw(st.sampled_from(("zigzag", "blocks"))),
    }
    return given, draw(st.integers(1, 5)), options, over


@given(cases())
@settings(max_examples=40, deadline=None)
def test_any_text(case: tuple[list[Tensor], int, dict[str, Any], dict[str, Any]]) -> None:
    given, parts, options, over = case
    found = over_ranks(given, parts, **options, **over)
    torch.testing.assert_close(found, attention(*given, **options), rtol=1e-12, atol=1e-12)
