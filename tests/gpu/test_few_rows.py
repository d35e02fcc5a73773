"""Products of few rows with what stands around them, in one kernel: against float64, and in captured steps."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.execution.fusion import operations, products
from runtime.execution.fusion.operations import ACTIVATIONS, rotated
from runtime.ops.kernels.decode.few_rows import MOST_ROWS, few_rows, takes
from runtime.ops.kernels.decode_attention import decode_attention
from tests.gpu.kernels.replays import assert_replays_are_exact
from tests.support import zoo

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CLOSE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def wanted(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, act: str, added: Tensor | None, norm: Any
) -> tuple[Tensor | None, Tensor]:
    total = None
    if added is not None:
        x = total = x + added
    h = x.double()
    if norm is not None:
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm[1])
        h = h if norm[0] is None else h * norm[0].double()
    y = h @ weight.double().T
    if gate is not None:
        y = y * ACTIVATIONS[act](h @ gate.double().T)
    return total, y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("rows", range(1, 5))
def test_products(rows: int, dtype: torch.dtype) -> None:
    ways = itertools.product([(1, 3), (10, 48), (7, 1100), (300, 2048), (5, 14336)], [False, True], range(4))
    for (num_out, inner), gated, way in ways:
        x, added = torch.randn(2, rows, inner, device="cuda", dtype=dtype)
        weight, gate = torch.randn(2, num_out, inner, device="cuda", dtype=dtype) / inner**0.5
        scale, bias = torch.randn(inner, device="cuda", dtype=dtype), torch.randn(num_out, device="cuda", dtype=dtype)
        given: dict[str, Any] = {
            "bias": bias if way == 1 and not gated else None,
            "gate": gate if gated else None,
            "act": "silu" if gated else "",
            "added": added if way == 3 else None,
            "norm": (scale if way == 3 else None, 1e-5) if way >= 2 else None,
        }
        assert takes(x, weight) == (rows <= MOST_ROWS)
        found = few_rows(x, weight, given.pop("bias"), **given) if way != 1 else few_rows(x, weight, **given)
        total, exact = wanted(x, weight, given.pop("bias", None), **given)
        if total is not None:
            assert torch.equal(found[0], total)
            found = found[1]
        torch.testing.assert_close(found.double(), exact, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("act", list(ACTIVATIONS))
def test_gates_and_biases(act: str) -> None:
    x, (weight, gate), bias = torch.randn(2, 96, device="cuda"), torch.randn(2, 33, 96, device="cuda"), None
    torch.testing.assert_close(
        few_rows(x, weight, gate=gate, act=act).double(),
        wanted(x, weight, None, gate, act, None, None)[1],
        rtol=1e-4,
        atol=1e-4,
    )
    bias = torch.randn(33, device="cuda")
    torch.testing.assert_close(
        few_rows(x, weight, bias).double(), wanted(x, weight, bias, None, "", None, None)[1], rtol=1e-4, atol=1e-4
    )


def test_a_chain_that_starts_early_reads_what_was_written() -> None:
    """Kernels that are launched before their predecessor's end: the same bits as one after the other, many times."""
    torch.manual_seed(0)
    weights = [torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) / 23 for _ in range(24)]

    def run(x: Tensor, *, waits: bool) -> Tensor:
        for weight in weights:
            x = few_rows(x, weight, norm=(None, 1e-5))
            if waits:
                torch.cuda.synchronize()
        return x

    assert_replays_are_exact(run, torch.randn(1, 512, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_attention_takes_what_is_cut_out_of_one_product(dtype: torch.dtype) -> None:
    for heads, kv_heads, width in [(8, 2, 64), (4, 4, 24), (32, 8, 128)]:
        whole = torch.randn(3, 1, heads + 2 * kv_heads, width, device="cuda", dtype=dtype).transpose(1, 2)
        q, k, v = whole.split([heads, kv_heads, kv_heads], 1)
        positions = torch.tensor([[0], [17], [99]], device="cuda")
        keys, values = torch.randn(2, 3, kv_heads, 100, width, device="cuda", dtype=dtype)
        caches = [(keys.clone(), values.clone()) for _ in range(2)]
        cut = decode_attention(q, k, v, positions, *caches[0], scale=width**-0.5)
        whole_ones = [x.contiguous() for x in (q, k, v)]
        assert torch.equal(cut, decode_attention(*whole_ones, positions, *caches[1], scale=width**-0.5))
        assert all(torch.equal(*each) for each in zip(*caches, strict=True))


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_attention_rotates_as_it_is_told(dtype: torch.dtype) -> None:
    for heads, kv_heads, width, of_batch in [(8, 2, 64, 1), (4, 4, 24, 3), (32, 8, 128, 3)]:
        batch, slots = 3, 100
        q = torch.randn(batch, heads, 1, width, device="cuda", dtype=dtype)
        k, v = torch.randn(2, batch, kv_heads, 1, width, device="cuda", dtype=dtype)
        cos, sin = torch.randn(2, of_batch, 1, 1, width, device="cuda", dtype=dtype)
        rotation = (cos, sin, width // 2)
        positions = torch.tensor([[0], [17], [99]], device="cuda")
        keys, values = torch.randn(2, batch, kv_heads, slots, width, device="cuda", dtype=dtype)
        caches = [(keys.clone(), values.clone()) for _ in range(2)]
        before = decode_attention(
            rotated(q, *rotation), rotated(k, *rotation), v, positions, *caches[0], scale=width**-0.5
        )
        inside = decode_attention(q, k, v, positions, *caches[1], scale=width**-0.5, rotation=rotation)
        torch.testing.assert_close(inside, before, rtol=CLOSE[dtype], atol=CLOSE[dtype])
        torch.testing.assert_close(caches[1][0], caches[0][0], rtol=CLOSE[dtype], atol=CLOSE[dtype])
        assert torch.equal(caches[1][1], caches[0][1])


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize("compile", [False, True])
def test_captured_steps_write_as_eager_ones(name: str, compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, int] = dict.fromkeys(("few_rows", "_added_norm", "_gated"), 0)

    def count(module: Any, name: str) -> None:
        real = getattr(module, name)

        def counted(*given: Any, **named: Any) -> Any:
            called[name] += 1
            return real(*given, **named)

        monkeypatch.setattr(module, name, counted)

    count(products.few_rows, "few_rows")
    count(operations, "_added_norm")
    count(operations, "_gated")
    model = zoo.tiny(name)[0].float().cuda()
    parts = partition(model, Plan())
    if compile and name == "gpt2":
        pytest.skip("its steps are compiled by torch, which test_chain looks at")
    for batch in (1,) if compile else (1, 3):  # of three, torch compiles
        ids = torch.arange(2, 2 + 5 * batch, device="cuda").view(batch, 5)
        said = [
            parts.engine(0, ThreadGroup(Mesh.of()).communicator(0), device="cuda", **how).generate(
                ids, max_new_tokens=12, eos_token_id=[]
            )
            for how in ({}, {"cuda_graph": True, "compile": compile})
        ]
        assert torch.equal(*said)
    assert called["few_rows"]
    if not compile and name not in ("gemma", "gpt2"):
        # steps of three rows; gemma's norms are of another form, gpt2 has neither
        assert called["_added_norm"]
        assert called["_gated"]
