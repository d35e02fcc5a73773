"""The recurrences in chunks, against their formulas token by token: in float64, at sizes around those of a chunk."""

import pytest
import torch
from torch import Tensor

from runtime.ops.state import gated_delta_rule, gated_linear_attention, selective_scan
from runtime.ops.state.chunks import BLOCK, LENGTH

SIZES = (1, 2, LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH + 3)
CLOSE = 1e-12
B, H, K, V, D, N = 2, 3, 5, 4, 6, 5


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heads(size: int) -> tuple[Tensor, ...]:
    """q, k, v, decay, beta, state."""
    q, k, v = (draw(i, B, size, H, width) for i, width in enumerate((K, K, V)))
    decay, beta = -draw(3, B, size, H).abs(), draw(4, B, size, H).sigmoid()
    return q, torch.nn.functional.normalize(k, dim=-1), v, decay, beta, draw(5, B, H, K, V)


def channels(size: int) -> tuple[Tensor, ...]:
    """x, dt, a, b, c, state."""
    a = -draw(2, D, N).abs()
    return draw(0, B, D, size), draw(1, B, D, size).abs(), a, draw(3, B, N, size), draw(4, B, N, size), draw(5, B, D, N)


def by_tokens(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    found = []
    for t in range(q.shape[1]):
        state = decay[:, t].exp().reshape(B, H, -1, 1) * state
        value = v[:, t]
        if beta is not None:
            value = beta[:, t, :, None] * (value - (k[:, t, :, None] @ state)[:, :, 0])
        state = state + k[:, t, :, :, None] * value[:, :, None]
        found.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(found, 1), state


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= CLOSE * other.abs().max()


@pytest.mark.parametrize("size", SIZES)
def test_linear_attention(size: int) -> None:
    q, k, v, decay, _, state = heads(size)
    assert_same(gated_linear_attention(q, k, v, decay, state), by_tokens(q, k, v, decay, None, state))
    assert_same(gated_linear_attention(q, k, v, decay), by_tokens(q, k, v, decay, None, torch.zeros_like(state)))


@pytest.mark.parametrize("size", SIZES)
def test_delta_rule(size: int) -> None:
    q, k, v, decay, beta, state = heads(size)
    assert_same(gated_delta_rule(q, k, v, decay, beta, state), by_tokens(q, k, v, decay, beta, state))
    assert_same(gated_delta_rule(q, k, v, decay, beta), by_tokens(q, k, v, decay, beta, torch.zeros_like(state)))


@pytest.mark.parametrize("strength", [1.0, 60.0], ids=["as usual", "that exp would overflow on"])
@pytest.mark.parametrize("size", [*SIZES, BLOCK, BLOCK + 1])
def test_delta_rule_with_a_decay_for_each_row_of_the_state(size: int, strength: float) -> None:
    q, k, v, _, beta, state = heads(size)
    decay = -draw(6, B, size, H, K).abs() * strength
    assert_same(gated_delta_rule(q, k, v, decay, beta, state), by_tokens(q, k, v, decay, beta, state))
    alike = decay[..., :1].expand(decay.shape)
    assert_same(gated_delta_rule(q, k, v, alike, beta), gated_delta_rule(q, k, v, decay[..., 0], beta))


@pytest.mark.parametrize("size", SIZES)
def test_scan(size: int) -> None:
    x, dt, a, b, c, state = channels(size)
    wanted, now = [], state
    for t in range(size):
        now = (dt[:, :, t, None] * a).exp() * now + (dt * x)[:, :, t, None] * b[:, None, :, t]
        wanted.append((now * c[:, None, :, t]).sum(-1))
    assert_same(selective_scan(x, dt, a, b, c, state), (torch.stack(wanted, -1), now))


def test_pieces_behind_each_other_are_the_whole() -> None:
    """Of any lengths; and the state that a piece is given is not written to."""
    q, k, v, decay, beta, state = heads(70)
    before = state.clone()
    whole = gated_delta_rule(q, k, v, decay, beta, state)
    first = gated_delta_rule(*(x[:, :33] for x in (q, k, v, decay, beta)), state)
    second = gated_delta_rule(*(x[:, 33:] for x in (q, k, v, decay, beta)), first[1])
    assert_same((torch.cat([first[0], second[0]], 1), second[1]), whole)
    assert torch.equal(state, before)


def test_a_state_is_kept_in_float32_at_least() -> None:
    given = [x.bfloat16() for x in heads(5)[:4]]
    out, state = gated_linear_attention(*given)
    assert out.dtype == state.dtype == torch.float32
