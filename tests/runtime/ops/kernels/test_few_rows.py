"""The product of one row with its norm, all of whose weights come at once, in Triton's interpreter."""

import pytest

from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton

CODE = """
import torch
from torch.nn.functional import silu
from runtime.ops.kernels.decode import few_rows as module, few_rows_kernel

def off(inner, num_out, columns, gated, adds, weighted, biased=False):
    torch.manual_seed(0)
    module._COLUMNS, module._PER_WARP = columns, max(16, columns // 4)
    x, added, norm = (torch.randn(1, inner).half() for _ in range(3))
    weight, gate = (torch.randn(num_out, inner).half() / inner**0.5 for _ in range(2))
    bias = torch.randn(num_out).half() if biased else None
    more = {"gate": gate, "act": "silu"} if gated else {}
    more |= {"added": added} if adds else {}
    found = module.few_rows(x, weight, bias, norm=(norm if weighted else None, 1e-5), **more)
    total = x + added if adds else x
    if adds:
        assert torch.equal(found[0], total)
        found = found[1]
    h = total.double()
    h = h * torch.rsqrt(h.square().mean() + 1e-5) * (norm.double() if weighted else 1.0)
    wanted = h @ weight.double().T * (silu(h @ gate.double().T) if gated else 1.0)
    wanted = wanted if bias is None else wanted + bias.double()
    return float((found.double() - wanted).abs().max())

def must_not(*given, **named):
    raise AssertionError("it takes the other kernel")

class Other:
    __getitem__ = must_not

few_rows_kernel.few_rows = Other()
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "96, 10, 32, False, True, True",
        "100, 6, 32, True, True, True",
        "128, 5, 32, True, False, False",
        "40, 7, 64, False, False, True, biased=True",
    ],
)
def test_a_whole_row_with_its_norm(case: str) -> None:
    assert_interpreted(f"{CODE}\nassert off({case}) < 4e-3")


@needs_triton
@pytest.mark.slow
def test_a_chunk_that_is_left_out_is_noticed() -> None:
    """The negative control."""
    short = """
real = few_rows_kernel.whole_row

class Short:
    def __getitem__(self, grid):
        return lambda *given, CHUNKS, **named: real[grid](*given, CHUNKS=CHUNKS - 1, **named)

few_rows_kernel.whole_row = Short()
"""
    assert_interpreted(f"{CODE}\n{short}\nassert off(96, 10, 32, False, False, True) > 0.1")
