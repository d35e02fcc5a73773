"""Rows as float8 with scales: how far a number may be off, and what is off by nothing."""

from __future__ import annotations

import pytest
import torch

from runtime.ops.kernels.float8_rows import from_float8, num_scales, to_float8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 24, 128, 129, 576])
def test_no_number_is_further_off_than_the_format_says(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(3, 2, 50, width, generator=generator, dtype=torch.float64)
    rows = (rows * torch.logspace(-3, 3, 50, dtype=torch.float64)[:, None]).to(dtype)  # tokens of unlike sizes
    codes, scales = to_float8(rows)
    assert (codes.dtype, codes.shape) == (torch.uint8, rows.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (*rows.shape[:-1], num_scales(width)))
    found = from_float8(codes, scales, torch.float64)
    each = scales.double().repeat_interleave(128, -1)[..., :width]
    allowed = torch.maximum(rows.double().abs() / 16, each * 2**-10) * (1 + 1e-6)
    assert ((found - rows.double()).abs() <= allowed).all()
    assert from_float8(codes, scales, dtype).dtype == dtype


def test_what_was_rounded_once_stays() -> None:
    rows = torch.randn(4, 7, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once = from_float8(*to_float8(rows), torch.float64)
    assert (from_float8(*to_float8(once), torch.float64) - once).abs().max() < 1e-6
    zeros = torch.zeros(2, 130)
    assert torch.equal(from_float8(*to_float8(zeros), torch.float32), zeros)
    small = torch.full((2, 3), 1e-44)
    assert from_float8(*to_float8(small), torch.float32).isfinite().all()


def test_a_number_that_is_none_stays_none() -> None:
    rows = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    found = from_float8(*to_float8(rows), torch.float32)
    assert found[0].isnan().any()
    assert torch.equal(found[1], rows[1])
