"""Kernels around one new token over a cache that ranks share out, in Triton's interpreter: torch's own operations."""

from __future__ import annotations

import pytest

from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton

INTERPRETED = """
import torch
from runtime.ops.kernels.decode.shared_decode import merged_rows, own_or_last_rows, packed_rows
from runtime.ops.rows.partial_attention import merge_parts

torch.manual_seed(0)
B, G, H, D, DV, SLOTS, P = 4, 2, 6, 20, 12, 9, 3
k, v = torch.randn(B, 1, G, D).transpose(1, 2), torch.randn(B, G, 1, DV)
keys, values = torch.randn(B + 2, G, SLOTS, D)[1:5], torch.randn(B + 2, G, SLOTS, DV)[1:5]
is_own, before = torch.tensor([[True], [False], [False], [True]]), torch.tensor([[3], [5], [0], [0]])
key, value, at = own_or_last_rows(k, v, keys, values, is_own, before)
assert at.tolist() == [[3], [4], [0], [0]]
for new, kept, found in ((k, keys, key), (v, values, value)):
    wanted = torch.where(is_own[..., None, None], new, kept[torch.arange(B)[:, None], :, at].transpose(1, 2))
    assert torch.equal(found, wanted)
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


@pytest.mark.slow
@needs_triton
def test_they_are_the_plain_forms() -> None:
    assert_interpreted(INTERPRETED)
