"""The kernels for chains of elementwise ops, against those ops in float64."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from runtime.execution.fusion import operations
from runtime.execution.fusion.operations import ACTIVATIONS, added_norm, gated, rotated

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CLOSE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def _by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What falls back would prove nothing."""

    def never(x: Tensor) -> Tensor:
        raise AssertionError("torch's op was asked")

    monkeypatch.setattr(operations, "ACTIVATIONS", dict.fromkeys(ACTIVATIONS, never))
    monkeypatch.setattr(operations, "LEAST_ROWS", 1)
    monkeypatch.setattr(torch, "roll", never)
    monkeypatch.setattr(torch, "rms_norm", never)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations(dtype: torch.dtype) -> None:
    for (b, h, s, d), layout in itertools.product(
        [(1, 1, 1, 2), (2, 3, 5, 16), (1, 32, 129, 128), (3, 5, 7, 24), (1, 40, 9, 80)],
        ["heads first", "tokens first", "cut"],
    ):
        if layout == "heads first":
            x = torch.randn(b, h, s, d, device="cuda", dtype=dtype)
        elif layout == "tokens first":
            x = torch.randn(b, s, h, d, device="cuda", dtype=dtype).transpose(1, 2)
        else:
            x = torch.randn(b, s, h, d + 8, device="cuda", dtype=dtype).transpose(1, 2)[..., 8:]
        for of_batch in {1, b}:
            cos, sin = torch.randn(2, of_batch, 1, s, d, device="cuda", dtype=dtype)
            found = rotated(x, cos, sin, d // 2)
            twice = torch.cat([x.double()] * 2, -1)[..., d // 2 : d // 2 + d]
            close(found, x.double() * cos.double() + twice * sin.double(), dtype)


GATES: dict[str, Callable[[Tensor], Tensor]] = dict(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", list(GATES))
def test_gates(act: str, dtype: torch.dtype) -> None:
    for shape in [(1, 1, 1), (2, 3, 100), (1, 5, 4096), (4, 14336)]:
        a, b = torch.randn(2, *shape, device="cuda", dtype=dtype) * 3
        close(gated(a, b, act), GATES[act](a.double()) * b.double(), dtype)
        both = torch.cat([a, b], -1)
        halves = both.chunk(2, -1)  # as one product for both leaves them
        close(gated(*halves, act), GATES[act](a.double()) * b.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_norms_of_sums(weighted: bool, dtype: torch.dtype) -> None:
    for shape in [(1, 1, 1), (2, 3, 100), (1, 5, 4096), (7, 16384)]:
        a, b = torch.randn(2, *shape, device="cuda", dtype=dtype)
        w = torch.randn(shape[-1], device="cuda", dtype=dtype) if weighted else None
        total, normed = added_norm(a, b, [shape[-1]], w, 1e-5, scales=weighted)
        assert torch.equal(total, a + b)
        exact = total.double()
        wanted = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
        close(normed, wanted if w is None else wanted * w.double(), dtype)
