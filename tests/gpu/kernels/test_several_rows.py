"""Products of several rows by tensor cores, against float64; in graphs, launched early, and among others' kernels."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from runtime.execution.fusion.operations import ACTIVATIONS
from runtime.ops.kernels.tiles.several_rows import several_rows, takes
from runtime.ops.kernels.triton_needs import replayed
from tests.gpu.kernels.replays import assert_replays_are_exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
    ),
]
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("rows", [2, 5, 16, 33, 64])
def test_products(rows: int, dtype: torch.dtype) -> None:
    ways = itertools.product([(1, 8), (48, 264), (200, 1032), (300, 4096), (6144, 512)], [False, True], [False, True])
    for (num_out, inner), gated, cut in ways:
        x = torch.randn(rows, inner + 8, device="cuda", dtype=dtype)[:, 8:]
        both = torch.randn(2, num_out, inner + 8 * cut, device="cuda", dtype=dtype)[..., :inner] / inner**0.5
        (weight, gate), bias = both, torch.randn(num_out, device="cuda", dtype=dtype)
        with replayed():
            assert takes(x, weight, gate if gated else None, bias) == (gated or rows <= 32)
        exact = x.double() @ weight.double().T
        if gated:
            exact = exact * ACTIVATIONS["silu"](x.double() @ gate.double().T)
        exact += bias.double()
        first = several_rows(x, weight, bias, gate=gate if gated else None, act="silu" if gated else "")
        torch.testing.assert_close(first.double(), exact, rtol=CLOSE[dtype], atol=CLOSE[dtype])
        again = several_rows(x, weight, bias, gate=gate if gated else None, act="silu" if gated else "")
        assert torch.equal(again, first)


def test_what_is_left_to_torch() -> None:
    x, weight = torch.randn(4, 64, device="cuda").half(), torch.randn(128, 64, device="cuda").half()
    with replayed():
        assert takes(x, weight, None, None)
        assert not takes(x[:1], weight, None, None)
        assert not takes(x.float(), weight.float(), None, None)
        assert not takes(x, weight[:, 1:], None, None)
        assert not takes(x.repeat(17, 1), weight, weight, None)
        assert takes(x.repeat(16, 1), weight, weight, None)
        assert not takes(x.repeat(16, 1), weight, None, None)
        assert not takes(x, weight.repeat(1024, 1), None, None)
    assert not takes(x, weight, None, None)


def test_a_chain_that_starts_early_reads_what_was_written() -> None:
    """Among kernels of torch, which wait, and of ours, which do not: the same bits as one after the other."""
    torch.manual_seed(0)
    weights = [torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) / 23 for _ in range(24)]

    def run(x: Tensor, *, waits: bool) -> Tensor:
        for number, weight in enumerate(weights):
            if number % 5 == 4:
                x = functional.layer_norm(x, [512])
            x = several_rows(x, weight, gate=weights[number - 1], act="silu") if number % 3 else several_rows(x, weight)
            if waits:
                torch.cuda.synchronize()
        return x

    assert_replays_are_exact(run, torch.randn(32, 512, device="cuda", dtype=torch.bfloat16))
