"""The kernel for weights that are held as codes and scales, against the plain form, on a GPU."""

import pytest
import torch

from runtime.ops.kernels.stored import stored_linear, stored_weight
from tests.runtime.ops.test_stored import CODES, held

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns when it is first imported
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "rows", "cols"), [(1, 70, 131), (17, 256, 512), (130, 33, 65)])
@pytest.mark.parametrize("code", CODES)
def test_the_kernel_is_the_product_with_the_numbers(
    code: str, tokens: int, rows: int, cols: int, dtype: torch.dtype
) -> None:
    from runtime.ops.kernels.stored_kernel import multiply  # Triton, which comes with torch for GPUs

    parts, _ = held(code, rows, cols)
    parts = tuple(None if part is None else part.cuda() for part in parts)
    x, bias = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in ((tokens, cols), (rows,)))
    weight = stored_weight(*parts, code=code, computed_in=torch.float32, dtype=dtype)
    expected = x.double() @ weight.double().T + bias.double()
    found = multiply(x, *parts, bias, code=code)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}[dtype]
    assert torch.equal(found, stored_linear(x, *parts, bias, code=code, computed_in=torch.float32))
