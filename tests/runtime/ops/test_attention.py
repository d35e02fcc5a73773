"""Attention against its definition, element by element."""

import itertools

import pytest
import torch
from torch import Tensor

from runtime.ops.attention import allowed, attention
from runtime.ops.mask import attention_mask


def definition(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, scale: float, mask=None, sinks=None, softcap=None, heads
):
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h, s in itertools.product(*map(range, q.shape[:3])):
        scores = (k[b, heads[h]] @ q[b, h, s]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores + mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])[b, h, s]
        weights = torch.where(seen[s], scores.exp(), 0)
        total = weights.sum() + (0 if sinks is None else sinks[h].exp())
        out[b, h, s] = (weights / total) @ v[b, heads[h]]
    return out


def tensors(
    heads: int = 4, groups: int = 2, q_length: int = 6, kv_length: int = 6, width: int = 3
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(2, heads, q_length, 5), normal(2, groups, kv_length, 5), normal(2, groups, kv_length, width)


LIMITS = [
    {},
    {"causal": True},
    {"causal": True, "window": 3},
    {"window": 2},
    {"causal": True, "chunk": 4},
    {"chunk": 4},
]
EXTRAS = ["plain", "mask", "sinks", "softcap"]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("extra", EXTRAS)
def test_definition(limits: dict[str, object], extra: str) -> None:
    q, k, v = tensors()
    more = {
        "plain": {},
        "mask": {"mask": torch.randn(2, 1, 6, 6, dtype=torch.float64)},
        "sinks": {"sinks": torch.randn(4, dtype=torch.float64)},
        "softcap": {"softcap": 1.5},
    }[extra]
    positions = torch.arange(6)
    seen = allowed(positions[:, None], positions, **limits)
    expected = definition(q, k, v, seen, scale=0.3, heads=[0, 0, 1, 1], **more)
    torch.testing.assert_close(attention(q, k, v, scale=0.3, **limits, **more), expected, rtol=1e-12, atol=1e-12)
    wider = {**limits, "window": 5} if "window" in limits else {**limits, "chunk": 6 if "chunk" in limits else 2}
    assert not torch.allclose(attention(q, k, v, scale=0.3, **wider, **more), expected)


def test_kv_map_of_uneven_groups() -> None:
    q, k, v = tensors(heads=3)
    everything = torch.ones(6, 6, dtype=torch.bool)
    expected = definition(q, k, v, everything, scale=1.0, heads=[0, 1, 1])
    torch.testing.assert_close(attention(q, k, v, scale=1.0, kv_map=[0, 1, 1]), expected, rtol=1e-12, atol=1e-12)


def test_keys_before_and_after_the_queries() -> None:
    q, k, v = tensors(q_length=2)
    positions = torch.arange(6)
    seen = allowed(positions[:2, None], positions, causal=True)
    expected = definition(q, k, v, seen, scale=1.0, heads=[0, 0, 1, 1])
    torch.testing.assert_close(attention(q, k, v, scale=1.0, causal=True), expected, rtol=1e-12, atol=1e-12)


def test_one_sink_per_query() -> None:
    q, k, v = tensors()
    sinks = torch.randn(4, dtype=torch.float64)
    spread = sinks.view(1, 4, 1, 1).expand(2, 4, 6, 1)
    assert torch.equal(attention(q, k, v, None, spread, scale=1.0), attention(q, k, v, None, sinks, scale=1.0))


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_no_heads_and_one_token(limits: dict[str, object]) -> None:
    q, k, v = tensors(heads=0, groups=0)
    assert attention(q, k, v, scale=1.0, **limits).shape == (2, 0, 6, 3)
    q, k, v = tensors(q_length=1, kv_length=1)
    expected = v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(attention(q, k, v, scale=1.0, **limits), expected)


def test_mask_has_the_values_of_transformers() -> None:
    padding = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    mask = attention_mask(padding, 4, 4, padding, dtype=torch.float32, causal=True, window=2)
    assert mask.shape == (2, 1, 4, 4)
    low = torch.finfo(torch.float32).min
    assert mask[0, 0].tolist() == [[0, low, low, low], [0, 0, low, low], [low, 0, 0, low], [low, low, 0, low]]
    assert mask[1, 0, 3].tolist() == [low, low, 0, 0]


@pytest.mark.parametrize("shape", [None, (1, 7), (4, 1, 7), (2, 1, 1, 7), (2, 4, 1, 7), (1, 4, 1, 7)])
@pytest.mark.parametrize("extra", ["plain", "written_out", "softcap", "sinks", "spread sinks"])
def test_one_query_of_grouped_heads(shape: tuple[int, ...] | None, extra: str) -> None:
    q, k, v = tensors(q_length=1, kv_length=7)
    mask = None if shape is None else torch.randn(shape, dtype=torch.float64)
    sinks = torch.randn(4, dtype=torch.float64) if "sinks" in extra else None
    softcap = 1.5 if extra == "softcap" else None
    expected = definition(
        q, k, v, torch.ones(1, 7, dtype=torch.bool),
        scale=0.3, mask=mask, sinks=sinks, softcap=softcap, heads=[0, 0, 1, 1],
    )  # fmt: skip
    if extra == "spread sinks":
        assert sinks is not None
        sinks = sinks.view(1, 4, 1, 1).expand(2, 4, 1, 1)
    found = attention(q, k, v, mask, sinks, scale=0.3, softcap=softcap, written_out=extra == "written_out")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 3])
def test_large_heads_in_float16(queries: int) -> None:
    """What queries and keys have in common may be too much for float16 before it is scaled, and not after."""
    q, k, v = torch.randn(1, 4, queries, 64), torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 8)
    q[..., 0], k[..., 0] = 300, 300
    found = attention(q.half(), k.half(), v.half(), scale=0.125, written_out=True)
    assert found.isfinite().all()
    assert found.abs().max() <= v.half().abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_keys_have_in_common_hides_no_difference(queries: int, dtype: torch.dtype) -> None:
    """As where the projection of the keys has large biases: all scores are 300 and a little."""
    q, k, v = torch.randn(1, 4, queries, 64), torch.randn(1, 2, 50, 64), torch.randn(1, 2, 50, 8)
    q[..., 0], k[..., 0] = 48, 50
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    exact = attention(q.double(), k.double(), v.double(), scale=0.125)
    found = attention(q, k, v, scale=0.125, written_out=True).double()
    assert (found - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()
    assert attention(*(x.to("meta") for x in (q, k, v)), scale=0.125, written_out=True).shape == found.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_cuda(dtype: torch.dtype, compiled: bool) -> None:
    q, k, v = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 300, 64), torch.randn(2, 2, 300, 64)
    q[..., 0], k[..., 0] = 48, 50
    q, k, v = (x.to("cuda", dtype) for x in (q, k, v))
    exact = attention(q.double(), k.double(), v.double(), scale=0.125)
    run = torch.compile(attention, dynamic=False) if compiled else attention
    found = run(q, k, v, scale=0.125, written_out=True).double()
    of_scores = 300 * torch.finfo(torch.float32).eps  # scores of 300 are held in float32 at least
    assert (found - exact).norm() < 4 * max(torch.finfo(dtype).eps, of_scores) * exact.norm()
