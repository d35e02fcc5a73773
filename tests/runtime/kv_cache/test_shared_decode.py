"""Kernels around one new token over a cache that ranks share out, in Triton's interpreter: torch's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.kv_cache.sharded_attention import ShardedAttention
from tests.runtime.kv_cache.sharded_cases import on_sharded, text
from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton
from tests.runtime.ops.rows.sp_cases import drawn

INTERPRETED = """
import torch
from runtime.ops.kernels.decode.shared_decode import merged_rows, own_or_last_rows, packed_rows
from runtime.ops.rows.partial_attention import merge_parts

torch.manual_seed(0)
B, G, H, D, DV, SLOTS, P = 4, 2, 6, 20, 12, 9, 3
k, v = torch.randn(B, 1, G, D).transpose(1, 2), torch.randn(B, G, 1, DV)
keys, values = torch.randn(B + 2, G, SLOTS, D)[1:5], torch.randn(B + 2, G, SLOTS, DV)[1:5]
is_own, before = torch.tensor([[True], [False], [False], [True]]), torch.tensor([[3], [5], [0], [0]])
q, cos, sin = torch.randn(B, 1, H, D).transpose(1, 2), torch.randn(B, 1, 1, D), torch.randn(1, 1, 1, D)
for rotation in (None, (cos, sin, D // 2), (cos, sin, -4)):
    query, key, value, at = own_or_last_rows(q, k, v, keys, values, is_own, before, rotation)
    assert at.tolist() == [[3], [4], [0], [0]]
    turned = lambda x: x if rotation is None else x * cos + torch.roll(x, -rotation[2], -1) * sin
    assert torch.allclose(query, turned(q), rtol=1e-5, atol=1e-6)
    assert rotation is None or not torch.allclose(query, q)
    for new, kept, found in ((turned(k), keys, key), (v, values, value)):
        wanted = torch.where(is_own[..., None, None], new, kept[torch.arange(B)[:, None], :, at].transpose(1, 2))
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)
out, lse = torch.randn(B, H, 1, DV).to(torch.float16), torch.randn(B, H)
out[2], lse[2] = torch.nan, torch.nan  # what lies in a slot that nobody has written
rows = packed_rows(out, lse, is_own, before)
assert torch.equal(rows[[0, 1, 3], ..., :-1], out[[0, 1, 3]].float()) and not rows[2, ..., :-1].any()
assert torch.equal(rows[[0, 1, 3], :, 0, -1], lse[[0, 1, 3]]) and (rows[2, ..., -1] == -torch.inf).all()
parts = torch.stack([rows, *torch.randn(P - 1, *rows.shape)])
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


def solved(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """What becomes x by a rotation."""
    width = x.shape[-1]
    matrix = torch.diag(cos.flatten()) + torch.roll(torch.eye(width, dtype=x.dtype), half, 1) * sin.flatten()[:, None]
    return torch.linalg.solve(matrix, x.transpose(-1, -2)).transpose(-1, -2)


@pytest.mark.slow
@needs_triton
def test_they_are_the_plain_forms() -> None:
    assert_interpreted(INTERPRETED)
