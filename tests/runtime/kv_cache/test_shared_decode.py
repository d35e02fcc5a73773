"""Kernels around one new token over a cache that ranks share out, in Triton's interpreter: torch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.kv_cache import sharded_attention
from runtime.kv_cache.sharded_attention import ShardedAttention
from runtime.ops.rows.partial_attention import merge_parts, partial_attention
from tests.runtime.kv_cache.sharded_cases import on_sharded, text
from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton
from tests.runtime.ops.rows.sp_cases import drawn

INTERPRETED = """
import torch
from runtime.ops.kernels import decode_attention as kernels
from runtime.ops.kernels.decode.shared_decode import merged_rows
from runtime.ops.rows.partial_attention import merge_parts, partial_attention

torch.manual_seed(0)
B, G, H, D, DV, SLOTS = 6, 2, 6, 20, 12, 200
q, k, v = torch.randn(B, 1, H, D).transpose(1, 2), torch.randn(B, 1, G, D).transpose(1, 2), torch.randn(B, G, 1, DV)
is_own = torch.tensor([[True], [False], [False], [True], [False], [True]])
before = torch.tensor([[3], [5], [0], [0], [199], [130]])
cos, sin = torch.randn(B, 1, 1, D), torch.randn(1, 1, 1, D)
for splits in (1, 3):
    kernels._splits = lambda *given, **named: splits
    for rotation in (None, (cos, sin, D // 2), (cos, sin, -4)):
        keys, values = torch.randn(B + 2, G, SLOTS, D)[1:7], torch.randn(B + 2, G, SLOTS, DV)[1:7]
        turned = lambda x: x if rotation is None else x * cos + torch.roll(x, -rotation[2], -1) * sin
        wanted_keys, wanted_values = keys.clone(), values.clone()
        for row in range(B):
            for kept in (keys, values, wanted_keys, wanted_values):  # what nobody may look at
                kept[row, :, before[row, 0]:] = torch.nan
            if is_own[row]:
                wanted_keys[row, :, before[row, 0]] = turned(k)[row, :, 0]
                wanted_values[row, :, before[row, 0]] = v[row, :, 0]
        found = kernels.decode_attention(
            q, k, v, before, keys, values, scale=0.3, softcap=5.0, rotation=rotation, is_own=is_own
        )
        # what is kept, and nothing else
        torch.testing.assert_close(keys, wanted_keys, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(values, wanted_values, rtol=0, atol=0, equal_nan=True)
        assert found.shape == (B, H, 1, DV + 1) and found.dtype == torch.float32
        for row in range(B):
            count = int(before[row]) + int(is_own[row])
            if not count:
                assert not found[row, ..., :-1].any() and (found[row, ..., -1] == -torch.inf).all()
                continue
            out, lse = partial_attention(
                turned(q)[row : row + 1].double(), wanted_keys[row : row + 1, :, :count].double(),
                wanted_values[row : row + 1, :, :count].double(), scale=0.3, softcap=5.0, mask=None,
            )
            wanted = torch.cat([out, lse[..., None]], -1)[0].float()
            torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-5)
        other = kernels.decode_attention(
            q, k, v, before, keys, values, scale=0.3, softcap=5.0, rotation=rotation, is_own=~is_own
        )
        assert not torch.allclose(found, other)  # the control: with the token of another rank's
parts = torch.stack([found, *torch.randn(2, *found.shape)])
parts[:, 2, 1, 0, -1] = -torch.inf  # nobody has any
wanted, _ = merge_parts(parts[..., :-1], parts[..., -1])
found = merged_rows(parts, torch.float32)
assert not found[2, 1].any()
torch.testing.assert_close(found, torch.where(wanted.isnan(), 0, wanted), rtol=1e-5, atol=1e-6)
assert not torch.allclose(found, merged_rows(parts[:2], torch.float32))  # the control: without one rank's part
"""


def test_a_rotation_that_is_left_to_a_step_is_done_behind_a_mask_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel is not taken after all: the same as queries and keys that were rotated before."""
    cos, sin, half = drawn(1, 1, 1, 6, seed=7), drawn(1, 1, 1, 6, seed=8), 3
    turned = lambda x: x * cos + torch.roll(x, -half, -1) * sin  # noqa: E731
    runs, original = text((5,), 8, 3), ShardedAttention.__call__
    expected, _ = on_sharded(runs, 1, 2, "ring", mask=torch.zeros(1, 1, 1, 1))

    def call(self: ShardedAttention, q: Tensor, k: Tensor, *given: Any) -> Tensor:
        if q.shape[2] > 1:
            return original(self, q, k, *given)
        back = lambda x: solved(x, cos, sin, half)  # noqa: E731
        assert torch.allclose(turned(back(q)), q)
        return original(self, back(q), back(k), *given, rotation=(cos, sin, half))

    monkeypatch.setattr(ShardedAttention, "__call__", call)
    found, _ = on_sharded(runs, 1, 2, "ring", mask=torch.zeros(1, 1, 1, 1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("prompts", [(1,), (5, 2, 9)])
def test_a_step_hands_the_kernel_what_it_takes(
    prompts: tuple[int, ...], sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's own operations in the kernels' place: as without them."""
    cos, sin, half = drawn(1, 1, 1, 6, seed=7), drawn(1, 1, 1, 6, seed=8), 3
    runs, original, calls = text(prompts, 8, 4), ShardedAttention.__call__, []
    options = {"sinks": drawn(4, seed=9)} if sinks else {}
    expected, _ = on_sharded(runs, len(prompts), 3, "ring", **options)

    def decode(
        q: Tensor, k: Tensor, v: Tensor, before: Tensor, keys: Tensor, values: Tensor, *, scale: float,
        softcap: float | None, rotation: Any, is_own: Tensor,
    ) -> Tensor:  # fmt: skip
        calls.append(rotation)
        q, k = (x * cos + torch.roll(x, -half, -1) * sin for x in (q, k))
        found = q.new_zeros(*q.shape[:3], v.shape[-1] + 1)
        found[..., -1] = -torch.inf
        for row, (count, own) in enumerate(zip(before[:, 0].tolist(), is_own[:, 0].tolist(), strict=True)):
            if own:
                keys[row, :, count], values[row, :, count] = k[row, :, 0], v[row, :, 0]
                count += 1
            if count:
                held = [each[row : row + 1, :, :count] for each in (keys, values)]
                out, lse = partial_attention(q[row : row + 1], *held, scale=scale, softcap=softcap, mask=None)
                found[row : row + 1] = torch.cat([out, lse[..., None]], -1)
        return found

    def call(self: ShardedAttention, q: Tensor, k: Tensor, *given: Any) -> Tensor:
        if not self.has_kernel:
            return original(self, q, k, *given)
        assert self.rotates(q, cos, sin, half)
        q, k = (solved(x, cos, sin, half) for x in (q, k))
        return original(self, q, k, *given, rotation=(cos, sin, half), ahead=True)

    monkeypatch.setattr(sharded_attention, "can_decode", lambda *given: True)
    monkeypatch.setattr(sharded_attention, "decode_attention", decode)
    monkeypatch.setattr(
        sharded_attention, "merged_rows", lambda parts, dtype: merge_parts(parts[..., :-1], parts[..., -1])[0].to(dtype)
    )
    monkeypatch.setattr(ShardedAttention, "__call__", call)
    found, _ = on_sharded(runs, len(prompts), 3, "ring", **options)
    assert calls
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def solved(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """What becomes x by a rotation."""
    width = x.shape[-1]
    matrix = torch.diag(cos.flatten()) + torch.roll(torch.eye(width, dtype=x.dtype), half, 1) * sin.flatten()[:, None]
    return torch.linalg.solve(matrix, x.transpose(-1, -2)).transpose(-1, -2)


@pytest.mark.slow
@needs_triton
def test_the_part_of_a_rank_and_parts_together() -> None:
    assert_interpreted(INTERPRETED)
