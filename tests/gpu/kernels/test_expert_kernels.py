"""The kernels that bring tokens to experts, against the plain form, on a GPU; nothing waits for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runtime.ops.expert_exchange import localise_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def block(hidden: Tensor, index: Tensor, gates: Tensor, weight: Tensor) -> Tensor:
    """One rank's half of the experts."""
    each = weight.shape[0] // 2
    owners = {"experts": range(2 * each), "counts": (each, each)}
    local, kept = localise_experts(index, gates, 1, axes=("ep",), **owners)
    rows, order, counts = expert_dispatch(hidden, local, each)
    return expert_combine(grouped_linear(rows, weight[each:], counts), order, kept)


def given(tokens: int, num_experts: int, choices: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(tokens)
    gates, index = torch.rand(tokens, num_experts, generator=random, dtype=torch.float64).topk(choices)
    hidden, weight = (
        torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((tokens, 64), (num_experts, 40, 64))
    )
    return hidden.to(dtype), index, gates.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "num_experts", "choices"), [(1, 4, 2), (64, 8, 8), (300, 128, 8), (5000, 256, 8)])
def test_half_of_the_experts(tokens: int, num_experts: int, choices: int, dtype: torch.dtype) -> None:
    on_host = given(tokens, num_experts, choices, dtype)
    expected = block(*(x.double() if x.is_floating_point() else x for x in on_host))
    on_device = tuple(x.cuda() for x in on_host)
    found = block(*on_device)
    off = (found.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert float(off) < DTYPES[dtype]


def test_nothing_waits_for_the_device() -> None:
    on_device = tuple(x.cuda() for x in given(300, 128, 8, torch.bfloat16))
    block(*on_device)  # constants come to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_it_is_the_same() -> None:
    on_device = tuple(x.cuda() for x in given(70, 8, 2, torch.bfloat16))
    compiled = torch.compile(block, dynamic=False)
    torch.testing.assert_close(compiled(*on_device), block(*on_device))
