"""Attention to parts of the keys: merged, the same as attention to all of them."""

import pytest
import torch
from torch import Tensor

from runtime.ops.attention import attention
from runtime.ops.rows.partial_attention import Merged, merge_parts, partial_attention, with_sinks

F64 = torch.float64


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def tensors(queries: int, keys: int, *, heads: int = 4, kv: int = 2, width: int = 6, value: int = 6) -> list[Tensor]:
    return [
        drawn(2, heads, queries, width, seed=1),
        drawn(2, kv, keys, width, seed=2),
        drawn(2, kv, keys, value, seed=3),
    ]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("value", [6, 3, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_are_the_whole(softcap: float | None, value: int, masked: bool) -> None:
    q, k, v = tensors(5, 11, value=value)
    mask = drawn(2, 1, 5, 11, seed=4) if masked else None
    if mask is not None:
        mask[0, :, 2, :7] = -torch.inf  # sees nothing of the first part
    sinks = drawn(4, seed=5)
    merged, parts = Merged(q, value), []
    for part in (slice(0, 7), slice(7, 7), slice(7, 11)):
        shown = None if mask is None else mask[..., part]
        found = partial_attention(q, k[:, :, part], v[:, :, part], scale=0.4, mask=shown, softcap=softcap)
        merged.add(*found, slice(0, 5))
        parts.append(found)
    expected = attention(q, k, v, mask, sinks, scale=0.4, softcap=softcap)
    torch.testing.assert_close(with_sinks(merged.out, merged.lse, sinks), expected, rtol=1e-12, atol=1e-12)
    out, lse = merge_parts(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]))
    torch.testing.assert_close(with_sinks(out, lse, sinks), expected, rtol=1e-12, atol=1e-12)
    # the controls: sinks once per part, and parts that are just added
    twice = sum(with_sinks(*found, sinks) * 0.5 for found in (parts[0], parts[2]))
    assert not torch.allclose(twice, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_causal_is_from_the_first_key(softcap: float | None) -> None:
    q, k, v = tensors(7, 7)
    out, _ = partial_attention(q, k, v, scale=0.4, causal=True, softcap=softcap)
    expected = attention(q, k, v, scale=0.4, causal=True, softcap=softcap)
    torch.testing.assert_close(out.to(F64), expected, rtol=1e-12, atol=1e-12)


def test_scores_are_written_out_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.ops.rows.partial_attention._TILE", 3)
    q, k, v = tensors(8, 8)
    mask = drawn(8, 8, seed=6)
    for causal in (False, True):
        found, lse = partial_attention(q, k, v, scale=0.4, causal=causal, mask=mask, softcap=2.0)
        expected = attention(q, k, v, mask, scale=0.4, causal=causal, softcap=2.0)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert lse.shape == (2, 4, 8)


def test_what_sees_nothing_is_neutral() -> None:
    q, k, v = tensors(3, 4)
    mask = torch.zeros(3, 4, dtype=F64)
    mask[1] = -torch.inf
    for softcap in (None, 2.0):
        out, lse = partial_attention(q, k, v, scale=0.4, mask=mask, softcap=softcap)
        assert (out[:, :, 1] == 0).all()
        assert (lse[:, :, 1] == -torch.inf).all()
        assert torch.isfinite(lse[:, :, 0]).all()
    none, lse = partial_attention(q, k[:, :, :0], v[:, :, :0], scale=0.4)
    assert not none.any()
    assert (lse == -torch.inf).all()
    merged = Merged(q, 6)
    merged.add(none, lse, slice(0, 3))
    merged.add(none, lse, slice(0, 3))
    assert not merged.out.isnan().any()
    assert not with_sinks(merged.out, merged.lse, drawn(4)).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_halves_are_merged_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (each.to(dtype) for each in tensors(5, 9))
    out, lse = partial_attention(q, k, v, scale=0.4)
    assert lse.dtype == torch.float32
    expected = attention(q.to(F64), k.to(F64), v.to(F64), scale=0.4)
    assert (out.to(F64) - expected).abs().max() < 0.02
    merged = Merged(q, 6)
    for part in (slice(0, 4), slice(4, 9)):
        merged.add(*partial_attention(q, k[:, :, part], v[:, :, part], scale=0.4), slice(0, 5))
    assert merged.out.dtype == torch.float32
    assert (merged.out - expected).abs().max() < 0.02
